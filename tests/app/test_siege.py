"""What strangers can do to a server with few descriptors: it goes on serving, and is not made to log."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from app_process import ForkedApp, wait_until

FEW_DESCRIPTORS = 64
_BOUNDED = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({FEW_DESCRIPTORS}, {FEW_DESCRIPTORS}))\n"
_HALF_A_BODY = b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
BEGINNINGS = {"idle": b"", "half a header": b"GET / HTTP/1.1\r\nHost: localhost\r\nX-", "half a body": _HALF_A_BODY}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedApp]:
    arguments = ("--enable-gpu-management", "--simulate-gpu", "48GB")
    with ForkedApp(tmp_path_factory.mktemp("recordings"), *arguments, prelude=_BOUNDED) as app:
        yield app  # type: ignore[misc]


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_connections_that_ask_for_nothing_keep_nobody_out(app: ForkedApp, beginning: str) -> None:
    app.forget_log()
    process = psutil.Process(app.process.pid)
    before_s, began_s = sum(process.cpu_times()[:2]), time.monotonic()
    with ExitStack() as until_done:
        for _ in range(3 * FEW_DESCRIPTORS):
            connection = until_done.enter_context(socket.create_connection(("127.0.0.1", app.port)))
            connection.sendall(BEGINNINGS[beginning])
        for _ in range(5):
            assert app.get("/healthz") == (200, {"status": "ok"})
        assert process.num_fds() < FEW_DESCRIPTORS
        busy_s, passed_s = sum(process.cpu_times()[:2]) - before_s, time.monotonic() - began_s
    assert len(app.log) < 2000, app.log
    assert busy_s < max(1.0, 0.5 * passed_s)


def test_a_limit_that_may_be_raised_is(tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    low = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({FEW_DESCRIPTORS}, {hard}))\n"
    with ForkedApp(tmp_path, prelude=low) as app:
        soft, _ = psutil.Process(app.process.pid).rlimit(psutil.RLIMIT_NOFILE)
        assert 1024 <= soft <= 4096, "enough, but not so many that select() and closing them all cannot cope"


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedApp]:
    """An app whose times are short enough for a test."""
    short = "from residency.web.server.connections import WITHIN_S\nfor each in WITHIN_S: WITHIN_S[each] = 1\n"
    with ForkedApp(tmp_path_factory.mktemp("recordings"), prelude=short) as app:
        yield app  # type: ignore[misc]


class TestPatience:
    @pytest.mark.parametrize("beginning", BEGINNINGS)
    def test_who_says_no_more_is_hung_up_on(self, hasty: ForkedApp, beginning: str) -> None:
        with socket.create_connection(("127.0.0.1", hasty.port), timeout=30) as connection:
            connection.sendall(BEGINNINGS[beginning])
            while connection.recv(1000):
                pass
        assert "Traceback" not in hasty.log

    @pytest.mark.parametrize("beginning", ["half a header", "half a body"])
    def test_a_byte_now_and_then_gains_no_time(self, hasty: ForkedApp, beginning: str) -> None:
        with socket.create_connection(("127.0.0.1", hasty.port), timeout=0.2) as connection:
            connection.sendall(BEGINNINGS[beginning])
            assert wait_until(lambda: _hangs_up_at(connection, b" "))

    def test_who_does_not_read_is_hung_up_on(self, hasty: ForkedApp) -> None:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", hasty.port))
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500)
            assert wait_until(lambda: not _open_to(hasty, connection.getsockname()[1]))


def _hangs_up_at(connection: socket.socket, piece: bytes) -> bool:
    try:
        connection.sendall(piece)
        return not connection.recv(1000)
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def _open_to(app: ForkedApp, port: int) -> bool:
    connections = psutil.Process(app.process.pid).net_connections()
    return any(each.raddr and each.raddr.port == port for each in connections)


class TestMemory:
    """What a session may be called, and how many are kept. Gradio keeps what it is sent."""

    LONG = "x" * 65

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/gradio_api/queue/join", {"fn_index": 0, "data": []}),
            ("/gradio_api/run/gpu_status", {"data": []}),
            ("/gradio_api/call/gpu_status", {"data": []}),
        ],
    )
    @pytest.mark.parametrize("name", [LONG, "", "a\nb", "名"])
    def test_sessions_with_strange_names_are_refused(
        self, app: ForkedApp, path: str, body: dict[str, Any], name: str
    ) -> None:
        code, said = app.post(path, {**body, "session_hash": name})
        assert code == 422
        assert "64 Latin letters" in said

    def test_requests_whose_answers_nobody_fetches_are_refused_in_the_end(self, app: ForkedApp) -> None:
        dependencies = app.get("/config")[1]["dependencies"]
        index = next(each["id"] for each in dependencies if each["api_name"] == "gpu_status")
        body = {"session_hash": "hoarder", "fn_index": index, "data": []}
        answers = [app.post("/gradio_api/queue/join", body) for _ in range(60)]
        assert answers[0][0] == 200
        assert answers[-1][0] == 503
        assert "try again" in answers[-1][1]
        assert app.post("/gradio_api/queue/join", {**body, "session_hash": "anna"})[0] == 200

    def test_listeners_are_so_many(self, app: ForkedApp) -> None:
        with ExitStack() as until_done:
            codes = [_first_line(until_done, app.port, "/gpu/events") for _ in range(30)]
            assert b"503" in codes[-1], "on so few descriptors there are not even 30"
            assert app.get("/healthz")[0] == 200


def _first_line(until_done: ExitStack, port: int, path: str) -> bytes:
    connection = until_done.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return connection.recv(100).partition(b"\r\n")[0]


@pytest.mark.parametrize("path", ["/gradio_api/here/anna", "/gradio_api/heartbeat/anna"])
def test_strangers_are_not_remembered_where_people_sign_in(closed: ForkedApp, path: str) -> None:
    code, said = closed.get(path)
    assert code == 401
    assert "Sign in" in said


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedApp]:
    with ForkedApp(tmp_path_factory.mktemp("recordings"), "--auth", "anna:secret") as app:
        yield app  # type: ignore[misc]
