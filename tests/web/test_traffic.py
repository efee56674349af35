from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from fakes import Gate, Worker
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from residency.web import traffic as traffic_module
from residency.web.traffic import Traffic


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def uploads() -> threading.Semaphore:
    return threading.Semaphore(0)


@pytest.fixture
def traffic(uploads: threading.Semaphore) -> Traffic:
    return Traffic(uploads.release)


@pytest.fixture
def client(traffic: Traffic, gate: Gate) -> Iterator[TestClient]:
    def slow(request: Request) -> PlainTextResponse:
        gate.pass_through()
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
