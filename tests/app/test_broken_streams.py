"""A stream of the speech API that ends too early: clients see that it is incomplete, also behind a proxy."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from app_process import ForkedApp, RunningApp, free_port, wait_until
from gated_engine import close_gate, open_gate
from reverse_proxies import bare_nginx

#: The second sentence waits at a gate of its own, and then fails; a long one is longer than all buffers of connections.
_FAILS_LATE = """
from residency.web.server import connections
connections.WITHIN_S[connections.Awaited.READING] = 0.5
def clone(self, recording, words, sentence):
    if "second" in sentence:
        gated_engine._pass("second")
        raise RuntimeError("broken")
    return gated_engine.torch.full((1, 9_600_000 if "long" in sentence else 24_000), 0.25), 24000
gated_engine.BuiltinEngine.clone = clone
"""
MANAGED = ("--enable-gpu-management", "--simulate-gpu", "48GB", "--shutdown-grace", "0")
TEXT = "The first sentence of two. The second sentence of two."


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    (tmp_path / "gates").mkdir()
    return tmp_path / "gates"


@pytest.fixture
def app(tmp_path: Path, gates: Path) -> Iterator[RunningApp]:
    close_gate(gates, "second")
    with ForkedApp(tmp_path / "tmp", *MANAGED, gates=gates, prelude=_FAILS_LATE) as app:
        yield app


def begin(port: int, version: str, text: str = TEXT) -> socket.socket:
    """Sends a request for two sentences; returns the connection once the first one arrives."""
    body = json.dumps({"input": text, "voice": "high", "response_format": "pcm"}).encode()
    line = socket.create_connection(("127.0.0.1", port), timeout=60)
    head = f"POST /v1/audio/speech HTTP/{version}\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    line.sendall(head.encode() + body)
    assert line.recv(12) == b"HTTP/1.1 200"
    return line


def rest(line: socket.socket) -> bytes:
    with line:
        return b"".join(iter(lambda: line.recv(1 << 16), b""))


BREAKS: dict[str, Callable[[RunningApp, Path], object]] = {
    "the engine fails": lambda app, gates: open_gate(gates, "second"),
    "the app is stopped": lambda app, gates: app.stop(signal.SIGTERM),
    "the app is killed": lambda app, gates: app.process.kill(),
}


@pytest.mark.parametrize("happens", BREAKS)
class TestItIsIncomplete:
    def test_in_chunks(self, app: RunningApp, gates: Path, happens: str) -> None:
        line = begin(app.port, "1.1")
        app.wait_for_line("at the gate: second")
        BREAKS[happens](app, gates)
        assert not rest(line).endswith(b"0\r\n\r\n")

    def test_without_chunks_the_connection_is_reset(self, app: RunningApp, gates: Path, happens: str) -> None:
        line = begin(app.port, "1.0")
        app.wait_for_line("at the gate: second")
        BREAKS[happens](app, gates)
        with pytest.raises(ConnectionResetError):
            rest(line)

    def test_behind_nginx_as_it_is_installed(self, app: RunningApp, gates: Path, happens: str, tmp_path: Path) -> None:
        port = free_port()
        with bare_nginx(app.port, tmp_path / "nginx", port):
            line = begin(port, "1.1")
            app.wait_for_line("at the gate: second")
            BREAKS[happens](app, gates)
            assert not rest(line).endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_it_is_logged_in_one_line(app: RunningApp, gates: Path, version: str) -> None:
    line = begin(app.port, version)
    app.wait_for_line("at the gate: second")
    app.forget_log()
    open_gate(gates, "second")
    with suppress(ConnectionResetError):
        rest(line)
    app.wait_for_line("broke off")
    assert app.get("/healthz")[0] == 200
    said = [each for each in app.log.splitlines() if each.strip() and "residency.moves" not in each]
    assert len(said) == 1, app.log
    assert re.search(r"/v1/audio/speech broke off after \d+ bytes: RuntimeError: broken$", said[0])


def test_who_stops_reading_without_chunks_sees_a_reset(app: RunningApp) -> None:
    line = begin(app.port, "1.0", "A long sentence.  And another long sentence.")
    port, process = line.getsockname()[1], psutil.Process(app.process.pid)

    def is_served() -> bool:
        ours = (each for each in process.net_connections() if each.raddr and each.raddr.port == port)
        return any(each.status == psutil.CONN_ESTABLISHED for each in ours)

    assert wait_until(lambda: not is_served())
    with pytest.raises(ConnectionResetError):
        rest(line)


def test_a_complete_one_without_chunks_ends_in_order(app: RunningApp) -> None:
    assert rest(begin(app.port, "1.0", "The first sentence of two. The last sentence of two."))


def test_nothing_is_left_after_a_stop(app: RunningApp) -> None:
    with begin(app.port, "1.1"):
        app.wait_for_line("at the gate: second")
        assert app.stop(signal.SIGTERM) == 0
    assert list(app.tmp_dir.rglob("*")) == []
