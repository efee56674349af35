from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from fakes import Gate, Worker
from serving import wait_until
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from residency.web import recordings
from residency.web import traffic as traffic_module
from residency.web.traffic import Traffic


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def uploads() -> threading.Semaphore:
    return threading.Semaphore(0)


@pytest.fixture
def ended() -> list[str]:
    """The sessions that have ended."""
    return []


@pytest.fixture
def traffic(uploads: threading.Semaphore, ended: list[str], tmp_path: Path) -> Traffic:
    return Traffic(
        str(tmp_path), uploads.release, lambda session: ended.clear(), ended.append, largest_upload_bytes=1 << 20
    )


@pytest.fixture
def client(traffic: Traffic, gate: Gate) -> Iterator[TestClient]:
    def slow(request: Request) -> PlainTextResponse:
        gate.pass_through()
        if error := getattr(request.app, "error", None):
            raise error
        return PlainTextResponse("done")

    routes = [Route(path, slow, methods=["GET", "POST"]) for path in ("/gradio_api/{rest:path}", "/")]
    with TestClient(Starlette(routes=routes, middleware=[Middleware(traffic.around)])) as client:
        yield client


@pytest.mark.parametrize("path", ["/gradio_api/queue/data", "/gradio_api/call/clone/1", "/gradio_api/file=/a.wav"])
def test_answers_on_their_way_are_waited_for(
    client: TestClient, traffic: Traffic, gate: Gate, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic_module, "_QUIET_S", 0)
    assert traffic.wait_until_quiet(30)
    receiver = Worker(client.get, path)
    gate.wait_for_arrival()
    assert not traffic.wait_until_quiet(0.05)
    waiter = Worker(traffic.wait_until_quiet, 30)
    gate.open()
    assert receiver.result().text == "done"
    assert waiter.result()


def test_who_hangs_up_and_does_not_call_again_is_reported(
    client: TestClient, traffic: Traffic, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Queue[str]()
    traffic._answers_end = gone.put
    monkeypatch.setattr(traffic_module, "_LINE_CUT_S", 0)
    lines = [Worker(client.get, f"/gradio_api/queue/data?session_hash={name}") for name in ("anna", "anna", "bert")]
    assert wait_until(lambda: traffic._lines == {"anna": 2, "bert": 1})
    gate.open()
    for line in lines:
        line.result()
    assert sorted([gone.get(timeout=30), gone.get(timeout=30)]) == ["anna", "bert"]
    client.get("/gradio_api/file=/a.wav")
    assert gone.empty()
    assert not +traffic._lines


def test_who_has_just_had_an_answer_may_come_for_its_recording(
    client: TestClient, traffic: Traffic, gate: Gate
) -> None:
    gate.open()
    client.get("/gradio_api/queue/data")
    assert not traffic.wait_until_quiet(traffic_module._QUIET_S / 10)
    assert traffic.wait_until_quiet(30)


@pytest.mark.parametrize("path", ["/", "/gradio_api/heartbeat/1", "/gradio_api/run/predict"])
def test_open_pages_are_no_answers(client: TestClient, traffic: Traffic, gate: Gate, path: str) -> None:
    open_page = Worker(client.get, path)
    gate.wait_for_arrival()
    assert traffic.wait_until_quiet(0.05)
    gate.open()
    open_page.result()


def test_the_beginning_of_an_upload_is_told_before_it_is_done(
    client: TestClient, uploads: threading.Semaphore, gate: Gate
) -> None:
    upload = Worker(client.post, "/gradio_api/upload?upload_id=1")
    gate.wait_for_arrival()
    assert uploads.acquire(timeout=30)
    gate.open()
    upload.result()
    client.get("/gradio_api/upload")
    assert not uploads.acquire(blocking=False)


class TestUploads:
    def test_one_that_is_too_large_is_refused_before_it_is_read(
        self, client: TestClient, uploads: threading.Semaphore
    ) -> None:
        answer = client.post("/gradio_api/upload", content=b"x" * (2 << 20))
        assert answer.status_code == 413
        assert "larger than 1 MB" in answer.text
        assert "--max-upload" in answer.text
        assert not uploads.acquire(blocking=False), "nobody is about to ask for speech"

    def test_a_full_disk_is_said(self, client: TestClient, gate: Gate) -> None:
        client.app.error = OSError(28, "No space left on device")  # type: ignore[attr-defined]
        gate.open()
        answer = client.post("/gradio_api/upload", content=b"x")
        assert answer.status_code == 507
        assert "No space left on device" in answer.text
        assert "--tmp-dir" in answer.text

    def test_what_was_given_up_leaves_nothing(self, client: TestClient, gate: Gate, tmp_path: Path) -> None:
        (tmp_path / "tmpabc").write_text("half of a recording")
        (tmp_path / "clone-1.wav").write_text("a result")
        (tmp_path / "tmpfolder").mkdir()
        other = Worker(client.post, "/gradio_api/upload")
        gate.wait_for_arrival()
        assert (tmp_path / "tmpabc").exists(), "it may be that of an upload that is under way"
        client.app.error = ClientDisconnect()  # type: ignore[attr-defined]
        gate.open()
        with pytest.raises(AssertionError):  # the client of the test misses an answer
            other.result()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["clone-1.wav", "tmpfolder"]


class TestSessions:
    """A page holds a line for as long as it is open."""

    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recordings, "LEFT_FOR_S", 0)

    def test_one_that_has_left_and_not_come_back_has_ended(self, traffic: Traffic, ended: list[str]) -> None:
        async def visit() -> None:
            lines = {name: asyncio.Event() for name in ("first", "again")}

            async def app(scope: Any, receive: Any, send: Any) -> None:
                await lines[scope["line"]].wait()

            def hold(line: str) -> asyncio.Future[None]:
                scope = {"type": "http", "method": "GET", "path": "/gradio_api/heartbeat/one", "line": line}
                return asyncio.ensure_future(traffic.around(app)(scope, None, None))  # type: ignore[arg-type]

            first, again = hold("first"), hold("again")
            await asyncio.sleep(0)
            lines["first"].set()
            await first
            await asyncio.to_thread(lambda: None)
            assert not ended, "it has come back"
            lines["again"].set()
            await again
            while not ended:
                await asyncio.sleep(0)

            again = hold("again")
            await again
            assert not ended, "it is there again"

        asyncio.run(visit())
