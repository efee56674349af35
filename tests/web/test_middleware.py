from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from anyio import to_thread
from app_process import wait_until
from fakes import Gate, Worker
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from residency.web.server import bodies
from residency.web.server import middleware as traffic_module
from residency.web.server.heartbeats import Heartbeats
from residency.web.server.middleware import RequestMiddleware
from residency.web.speech.recordings import DiskFull


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def uploads() -> threading.Semaphore:
    return threading.Semaphore(0)


@pytest.fixture
def begun() -> list[str]:
    """The sessions that were heard of."""
    return []


@pytest.fixture
def traffic(uploads: threading.Semaphore, begun: list[str], tmp_path: Path) -> RequestMiddleware:
    presence = Heartbeats(begun.append, lambda session: None)
    return RequestMiddleware(
        tmp_path,
        presence,
        uploads.release,
        largest_upload_bytes=1 << 20,
        largest_body_bytes=1 << 16,
        know=lambda session: session == "anna",
    )


@pytest.fixture
def client(traffic: RequestMiddleware, gate: Gate) -> Iterator[TestClient]:
    async def slow(request: Request) -> PlainTextResponse:
        if request.headers.get("authorization") == "none":
            return PlainTextResponse("sign in", 401)
        read_bytes = 0
        async for piece in request.stream():
            read_bytes += len(piece)
        await to_thread.run_sync(gate.pass_through)
        if error := getattr(request.app, "error", None):
            raise error
        return PlainTextResponse(f"read {read_bytes}")

    routes = [Route("/{rest:path}", slow, methods=["GET", "POST"])]
    with TestClient(Starlette(routes=routes, middleware=[Middleware(traffic.around)])) as client:
        yield client


@pytest.mark.parametrize("path", ["/gradio_api/queue/data", "/gradio_api/call/clone/1", "/gradio_api/file=/a.wav"])
def test_answers_on_their_way_are_waited_for(
    client: TestClient, traffic: RequestMiddleware, gate: Gate, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic_module, "_QUIET_S", 0)
    assert traffic.wait_until_quiet(30)
    receiver = Worker(client.get, path)
    gate.wait_for_arrival()
    assert not traffic.wait_until_quiet(0.05)
    waiter = Worker(traffic.wait_until_quiet, 30)
    gate.open()
    assert receiver.result().text == "read 0"
    assert waiter.result()


def test_who_hangs_up_and_does_not_call_again_is_reported(
    client: TestClient, traffic: RequestMiddleware, gate: Gate
) -> None:
    gone, asked = Queue[str](), list[str]()

    def still_waits(session: str, for_s: float) -> bool:
        asked.append(session)
        if session == "bert" and asked.count("bert") < 3:
            return True  # for something that it has asked for a moment ago
        gone.put(session)
        return False

    traffic.answers_end = still_waits
    traffic._result_streams._timeout_s = 0
    lines = [Worker(client.get, f"/gradio_api/queue/data?session_hash={name}") for name in ("anna", "anna", "bert")]
    assert wait_until(lambda: traffic._result_streams._streams == {"anna": 2, "bert": 1})
    gate.open()
    for line in lines:
        line.result()
    assert sorted([gone.get(timeout=30), gone.get(timeout=30)]) == ["anna", "bert"]
    client.get("/gradio_api/file=/a.wav")
    assert gone.empty()
    assert asked.count("bert") == 3
    assert asked.count("anna") == 1
    assert wait_until(lambda: not traffic._result_streams._streams and not traffic._result_streams._silent)


def test_a_short_cut_is_no_end_however_long_ago_the_last_answer_was(
    client: TestClient, traffic: RequestMiddleware, gate: Gate
) -> None:
    """The time counts from the last cut, and not from an earlier one."""
    gate.open()
    ends: list[float] = []
    for _ in range(2):
        client.get("/gradio_api/queue/data?session_hash=anna")
        assert wait_until(lambda: not traffic._result_streams._streams)
        (end,) = traffic._result_streams._silent.values()
        ends.append(end.when())
    assert ends[0] < ends[1]


def test_who_has_just_had_an_answer_may_come_for_its_recording(
    client: TestClient, traffic: RequestMiddleware, gate: Gate
) -> None:
    gate.open()
    client.get("/gradio_api/queue/data")
    assert not traffic.wait_until_quiet(traffic_module._QUIET_S / 10)
    assert traffic.wait_until_quiet(30)


@pytest.mark.parametrize("path", ["/", "/gradio_api/heartbeat/1", "/gradio_api/run/predict"])
def test_open_pages_are_no_answers(client: TestClient, traffic: RequestMiddleware, gate: Gate, path: str) -> None:
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
    client.post("/nonsense/upload")
    assert client.post("/gradio_api/upload", headers={"Authorization": "none"}).status_code == 401
    assert not uploads.acquire(blocking=False), "nobody has uploaded, or may"


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

    def test_one_for_which_there_is_no_room_is_read_no_further_and_refused(
        self, client: TestClient, traffic: RequestMiddleware, uploads: threading.Semaphore
    ) -> None:
        asked: list[float] = []

        @contextmanager
        def refuse(most_bytes: float) -> Iterator[None]:
            asked.append(most_bytes)
            raise DiskFull
            yield

        traffic.reserved = refuse
        answer = client.post("/gradio_api/upload", content=b"x")
        assert answer.status_code == 507
        assert "--max-disk" in answer.text
        assert asked == [1], "what the request announces"
        assert not uploads.acquire(blocking=False), "nobody is about to ask for speech"

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


class TestLargeBodies:
    """Whether or not their size is told, and of however many files."""

    @pytest.mark.parametrize(
        ("path", "limit_bytes", "way_out"),
        [("/gradio_api/upload", (1 << 20) + 10_000, "--max-upload"), ("/gradio_api/queue/join", 1 << 16, "as files"),
         ("/login", 1 << 16, "as files")],
    )  # fmt: skip
    def test_they_are_read_up_to_the_limit(
        self,
        client: TestClient,
        gate: Gate,
        path: str,
        limit_bytes: int,
        way_out: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(bodies, "_LINGER_S", math.inf)  # who has sent all is answered without it
        gate.open()
        told, untold = b"x" * limit_bytes, lambda: iter([b"x" * (limit_bytes - 1), b"x"])
        for body in (told, untold()):
            assert client.post(path, content=body).text == f"read {limit_bytes}"
        for body in (told + b"x", itertools.chain(untold(), [b"x"])):
            answer = client.post(path, content=body)
            assert (answer.status_code, way_out in answer.text) == (413, True)


class TestRefusedBodies:
    """Clients that send a body read the answer after it: they would hear of a broken connection only."""

    @staticmethod
    def read_before_the_answer(headers: list[tuple[bytes, bytes]], status: int, pieces: int = 3) -> int:
        """Returns how many pieces of a body are read before an app answers that reads none."""
        read, read_by_then = itertools.count(), list[int]()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async def receive() -> Any:
            return {"type": "http.request", "body": b"x", "more_body": next(read) < pieces - 1}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                read_by_then.append(next(read))

        scope = {"type": "http", "method": "POST", "path": "/v1/audio/speech", "headers": headers}
        asyncio.run(bodies.read_at_most(1000, "too large", app, scope, receive, send))
        return read_by_then[0]

    @pytest.mark.parametrize("header", [(b"content-length", b"3"), (b"transfer-encoding", b"chunked")])
    def test_are_read_before_the_refusal(self, header: tuple[bytes, bytes]) -> None:
        assert self.read_before_the_answer([header], 401) == 3
        assert self.read_before_the_answer([header], 200) == 0

    def test_are_not_if_the_client_waits_for_the_answer(self) -> None:
        assert self.read_before_the_answer([(b"content-length", b"3"), (b"expect", b"100-continue")], 401) == 0

    def test_nothing_is_read_where_nothing_is_sent(self) -> None:
        assert self.read_before_the_answer([], 401) == 0


class TestOtherSites:
    @pytest.fixture(autouse=True)
    def at_once(self, gate: Gate) -> None:
        gate.open()

    @pytest.mark.parametrize(
        ("headers", "allowed"),
        [
            ({}, True),
            ({"Origin": "http://testserver"}, True),
            ({"Origin": "http://evil.example"}, False),
            ({"Origin": "http://testserver:9999"}, False),
            ({"Origin": "null"}, False),
            ({"Sec-Fetch-Site": "cross-site"}, False),
            ({"Sec-Fetch-Site": "same-site"}, False),
            ({"Sec-Fetch-Site": "same-origin", "Origin": "https://tts.example"}, True),
            ({"X-Forwarded-Host": "tts.example", "Origin": "http://tts.example"}, True),
            ({"X-Forwarded-Host": "tts.example, inner", "Origin": "http://tts.example"}, True),
            ({"X-Forwarded-Host": "tts.example", "Origin": "http://evil.example"}, False),
        ],
    )
    def test_their_pages_may_send_nothing(self, client: TestClient, headers: dict[str, str], allowed: bool) -> None:
        answer = client.post("/gradio_api/queue/join", headers=headers)
        assert answer.status_code == (200 if allowed else 403)
        assert allowed or "X-Forwarded-Host" in answer.text

    def test_their_pages_may_read_nothing_and_their_links_work(self, client: TestClient) -> None:
        assert client.get("/gpu/status", headers={"Origin": "http://evil.example"}).status_code == 403
        assert client.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).is_success


def test_pages_are_in_no_frame_of_other_sites_and_load_nothing_from_them(traffic: RequestMiddleware) -> None:
    routes = [Route("/", lambda request: HTMLResponse("a page")), Route("/plain", lambda request: PlainTextResponse())]
    with TestClient(Starlette(routes=routes, middleware=[Middleware(traffic.around)])) as client:
        policy = client.get("/").headers["content-security-policy"]
        assert policy.startswith("default-src 'self' ")
        assert policy.endswith("; frame-ancestors 'self'")
        assert "content-security-policy" not in client.get("/plain").headers


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/heartbeat/anna", "/gradio_api/queue/data?session_hash=anna", "/gradio_api/call/clone/anna",
     "/gradio_api/here/anna"],
)  # fmt: skip
def test_who_listens_or_says_so_is_there(client: TestClient, gate: Gate, begun: list[str], path: str) -> None:
    gate.open()
    client.get("/gradio_api/queue/status")
    assert begun == []
    assert client.get(path).is_success
    assert begun == ["anna"]


@pytest.mark.parametrize(("language", "words"), [("zh-CN,zh", "请重新上传录音"), ("en", "upload the recording again")])
def test_a_page_that_is_not_known_hears_what_that_means(
    client: TestClient, begun: list[str], gate: Gate, language: str, words: str
) -> None:
    gate.open()
    assert client.get("/gradio_api/here/anna", headers={"Accept-Language": language}).status_code == 204
    answer = client.get("/gradio_api/here/bert", headers={"Accept-Language": language})
    assert answer.status_code == 410
    assert words in answer.text
    assert "  " not in answer.text
    assert begun == ["anna"], "who is not known is not remembered"
    client.get("/gradio_api/heartbeat/bert")
    client.get("/gradio_api/here/bert")
    assert begun == ["anna", "bert", "bert"], "who goes on there has recordings again"
