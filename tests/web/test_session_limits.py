from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from anyio import to_thread
from fakes import Gate, Worker
from gradio import route_utils, routes
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from residency.web.server import session_limits
from residency.web.server.session_limits import session_requests

LINES = ["/gradio_api/heartbeat/{}", "/gradio_api/queue/data?session_hash={}", "/gradio_api/call/clone/{}",
         "/gradio_api/upload_progress?upload_id={}"]  # fmt: skip
NAMED = [*LINES, "/gradio_api/here/{}"]


@pytest.fixture
def gate() -> Gate:
    return Gate()


def may_stay(request: HTTPConnection) -> bool:
    return request.headers.get("cookie") == "anna"


@pytest.fixture
def client(gate: Gate) -> Iterator[TestClient]:
    async def slow(request: Request) -> PlainTextResponse:
        await to_thread.run_sync(gate.pass_through)
        return PlainTextResponse("heard")

    routes = [Route("/{rest:path}", slow, methods=["GET", "POST"])]
    with TestClient(Starlette(routes=routes, middleware=[Middleware(session_requests(may_stay, most=1))])) as client:
        yield client


@pytest.mark.parametrize("path", [*NAMED, "/gradio_api/upload?upload_id={}"])
@pytest.mark.parametrize(
    ("name", "allowed"),
    [("anna", True), ("5f0c2d3e-e1b7_X", True), ("x" * 64, True), ("x" * 65, False), ("", False), ("%0a", False),
     ("anna%00", False), ("%E5%AE%89", False), ("a b", False)],
)  # fmt: skip
def test_only_short_plain_names_are_taken(client: TestClient, gate: Gate, path: str, name: str, allowed: bool) -> None:
    gate.open()
    ask = client.post if path.startswith("/gradio_api/upload?") else client.get
    answer = ask(path.format(name), headers={"Cookie": "anna"})
    assert answer.status_code == (200 if allowed else 422)
    assert allowed or "64 Latin letters" in answer.text


@pytest.mark.parametrize("path", ["/gradio_api/here/bert", "/gradio_api/heartbeat/bert"])
def test_who_has_not_signed_in_is_not_remembered(client: TestClient, gate: Gate, path: str) -> None:
    gate.open()
    answer = client.get(path)
    assert answer.status_code == 401
    assert "Sign in" in answer.text
    assert client.get(path, headers={"Cookie": "anna"}).is_success


@pytest.mark.parametrize("path", [*LINES, "/gpu/events"])
def test_there_are_so_many_lines_and_room_for_everything_else(client: TestClient, gate: Gate, path: str) -> None:
    client.headers["Cookie"] = "anna"
    held = Worker(client.get, path.format("anna"))
    gate.wait_for_arrival()
    refused = client.get(path.format("bert"))
    gate.open()
    assert refused.status_code == 503
    assert "try again" in refused.text
    assert client.get("/gradio_api/here/anna").is_success
    assert held.result().is_success
    assert client.get(path.format("bert")).is_success


def test_gradio_forgets_the_names_of_deleted_files(tmp_path: Path) -> None:
    kept = tmp_path / "kept.wav"
    kept.touch()
    names = {str(kept), str(tmp_path / "deleted by the owner of the session.wav")}
    blocks: Any = SimpleNamespace(temp_file_sets=[names], blocks={})
    route_utils.delete_files_created_by_app(blocks, 3600)
    assert len(names) == 2, "its own delete_cache keeps the name of a file that is gone"
    session_limits.forget_deleted_files(blocks)
    assert names == {str(kept)}


def test_gradio_stores_a_limited_number_of_uploads_and_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_limits, "_REMEMBERED", 3)
    statuses = route_utils.FileUploadProgress()
    monkeypatch.setattr(routes, "file_upload_statuses", statuses)
    session_limits.limit_uploads()
    queue: Any = SimpleNamespace(push=None, event_analytics={}, pending_event_ids_session=defaultdict(set))
    session_limits.limit_queue(queue)
    for number in range(5):
        statuses.track(f"upload-{number}")
        assert statuses._signals[f"upload-{number}"].is_set()
        queue.event_analytics[f"event-{number}"] = queue.pending_event_ids_session[f"session-{number}"] = set()
    for stored in (statuses._statuses, statuses._signals, queue.event_analytics, queue.pending_event_ids_session):
        assert len(stored) == 3
