"""Neighbours that are asked for room: real servers of this test that hold memory of a simulated card."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from card_use import Weights
from sleeping_server import Vllm, vllm

from gpu_manager import GPUResourceManager, RequestTimeout, Sharing, SimulatedDevice, State
from residency.errors import InvalidInput, NeighborUnreachable
from residency.neighbors.ollama import Ollama
from residency.sharing.board import Board
from residency.sharing.tickets import PRESENCE, Ticket

MB = 1 << 20
CAPACITY = 100 * MB


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice(CAPACITY)


def managed(device: SimulatedDevice, *servers: Vllm, keep_warm: float = 0, headroom: int = 0) -> GPUResourceManager:
    sharing = Sharing(headroom, tuple(f"vllm={server.url}" for server in servers))
    manager = GPUResourceManager(device, keep_warm=keep_warm, sharing=sharing)
    manager.register("tts", lambda: Weights(60 * MB), size_bytes=60 * MB)
    return manager


def test_an_idle_neighbour_gives_up_its_memory_and_gets_it_back(device: SimulatedDevice) -> None:
    with vllm(device, 80 * MB) as server, managed(device, server) as manager:
        with manager.lease("tts"):
            assert server.calls == ["/sleep"]
            assert manager.status()["sharing"]["neighbors"][0]["asked_ago_s"] is not None  # type: ignore[index]
        assert server.woken.wait(60)
        assert server.calls == ["/sleep", "/wake_up"]


def test_as_few_are_asked_as_necessary(device: SimulatedDevice) -> None:
    with vllm(device, 30 * MB) as first, vllm(device, 30 * MB) as second, managed(device, first, second) as manager:
        with manager.lease("tts"):
            pass
        assert (first.calls[:1], second.calls) == (["/sleep"], [])


def test_own_idle_models_leave_before_a_neighbour_is_asked(device: SimulatedDevice) -> None:
    with vllm(device, 30 * MB) as server, managed(device, server, keep_warm=600) as manager:
        manager.register("asr", lambda: Weights(60 * MB), size_bytes=60 * MB)
        for name in ("tts", "asr"):
            with manager.lease(name):
                pass
        assert server.calls == []
        assert manager.status()["models"]["tts"]["state"] == "cpu"


def test_a_neighbour_in_use_is_not_asked(device: SimulatedDevice) -> None:
    with vllm(device, 80 * MB) as server, managed(device, server) as manager:
        server.running = 1
        with pytest.raises(RequestTimeout, match=f"{server.pid}.*80 MB"), manager.lease("tts", timeout=1):
            pass
        assert server.calls == []
        assert manager.status()["sharing"]["neighbors"][0]["in_use"] is True  # type: ignore[index]
        with pytest.raises(InvalidInput, match="in use"):
            manager.ask_neighbor(server.url)


def test_only_requests_ask(device: SimulatedDevice) -> None:
    with vllm(device, 80 * MB) as server, managed(device, server) as manager:
        manager.warm("tts")
        assert manager.wait_for("tts", State.DEVICE, 60) is False
        assert server.calls == []


def test_one_is_asked_by_hand(device: SimulatedDevice) -> None:
    with vllm(device, 80 * MB) as server, managed(device, server) as manager:
        with pytest.raises(InvalidInput, match="no neighbour"):
            manager.ask_neighbor("http://127.0.0.1:1")
        manager.ask_neighbor(server.url)
        assert server.calls == ["/sleep"]
    assert server.calls == ["/sleep", "/wake_up"], "the end of the manager gives back what was asked for"
    with GPUResourceManager(device) as manager, pytest.raises(InvalidInput, match="not shared"):
        manager.ask_neighbor(server.url)


def test_a_neighbour_that_does_not_answer_is_named_and_the_next_is_asked(device: SimulatedDevice) -> None:
    with vllm(device, 80 * MB) as server:
        sharing = Sharing(0, ("vllm=http://127.0.0.1:1", f"vllm={server.url}"))
        with GPUResourceManager(device, sharing=sharing) as manager:
            manager.register("tts", lambda: Weights(60 * MB), size_bytes=60 * MB)
            with manager.lease("tts"):
                first, second = manager.status()["sharing"]["neighbors"]  # type: ignore[index]
            assert "GET /is_sleeping failed" in (first["answer"] or "")
            assert second["answer"] is None
            with pytest.raises(NeighborUnreachable):
                manager.ask_neighbor("http://127.0.0.1:1")


def test_a_wrong_neighbour_is_refused_at_the_start(device: SimulatedDevice) -> None:
    with pytest.raises(InvalidInput, match="KIND=URL"):
        GPUResourceManager(device, sharing=Sharing(neighbors=("localhost:11434",)))
    assert "secret" not in repr(Sharing(neighbors=("ollama=http://secret@127.0.0.1:11434",)))


def test_it_is_asked_also_while_an_own_model_is_in_use(device: SimulatedDevice) -> None:
    with vllm(device, 30 * MB) as server, managed(device, server) as manager:
        manager.register("asr", lambda: Weights(30 * MB), size_bytes=30 * MB)
        with manager.lease("asr"), concurrent.futures.ThreadPoolExecutor() as threads:
            threads.submit(lambda: manager.lease("tts", timeout=60).__enter__()).result(60)
        assert server.calls[:1] == ["/sleep"]


def test_an_address_that_is_given_twice_is_one_server(device: SimulatedDevice) -> None:
    with vllm(device, 80 * MB) as server:
        addresses = (f"vllm={server.url}", f"vllm={server.url.replace('127.0.0.1', 'localhost')}")
        with GPUResourceManager(device, sharing=Sharing(neighbors=addresses)) as manager:
            for neighbor in manager.status()["sharing"]["neighbors"]:  # type: ignore[index]
                manager.ask_neighbor(neighbor["url"])
            assert server.calls == ["/sleep"]
        assert server.calls == ["/sleep", "/wake_up"]


def test_an_app_wakes_only_what_it_has_put_to_sleep(device: SimulatedDevice) -> None:
    with vllm(device, 80 * MB) as server, managed(device, server) as first:
        first.ask_neighbor(server.url)
        with managed(device, server) as second:
            second.ask_neighbor(server.url)
        assert server.calls == ["/sleep"]
    assert server.calls == ["/sleep", "/wake_up"]


def test_a_neighbour_with_an_unexpected_error_does_not_keep_the_next_from_being_asked(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Ollama, "held", lambda _: int("5 GB"))
    with vllm(device, 80 * MB) as server:
        sharing = Sharing(neighbors=("ollama=http://127.0.0.1:1", f"vllm={server.url}"))
        with GPUResourceManager(device, sharing=sharing) as manager:
            manager.register("tts", lambda: Weights(60 * MB), size_bytes=60 * MB)
            with manager.lease("tts"):
                first, second = manager.status()["sharing"]["neighbors"]  # type: ignore[index]
    assert "5 GB" in (first["answer"] or "")
    assert second["asked_ago_s"] is not None
    assert len([record for record in caplog.records if "5 GB" in record.getMessage()]) == 1


OLLAMA = """
import http.server, os

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"models": [{"name": "tiny", "size_vram": 5}]}')

    def log_message(self, *_): ...

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(os.getpid(), server.server_port, flush=True)
server.serve_forever()
"""


@contextmanager
def ollama(path: Path, orphan: bool = True) -> Iterator[tuple[int, str]]:
    """Yields pid and address of a server with Ollama's calls, which is no child of this process if ``orphan``."""
    path.parent.mkdir(parents=True)
    path.write_text(OLLAMA)
    start = "import subprocess, sys; subprocess.Popen(sys.argv[1:])"
    command = [sys.executable, "-c", start, sys.executable, str(path)] if orphan else [sys.executable, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid, port = map(int, process.stdout.readline().split())
        try:
            if orphan:
                process.wait()
            yield pid, f"http://127.0.0.1:{port}"
        finally:
            os.kill(pid, signal.SIGKILL)


def test_auto_finds_servers_but_not_those_of_this_app_and_of_other_apps(
    device: SimulatedDevice, tmp_path: Path
) -> None:
    with (
        ollama(tmp_path / "1" / "ollama.py") as (pid, url),
        ollama(tmp_path / "2" / "ollama.py") as (peer, _),
        ollama(tmp_path / "3" / "ollama.py", orphan=False) as (own, _),
    ):
        for each in (own, peer, pid):
            device.report_outside(each, 30 * MB)
        now_s, board = time.monotonic(), Board(tmp_path, device.identity)
        board.change(lambda _: ((Ticket(f"{PRESENCE}peer", "", peer, now_s, 0, now_s + 4, True),), None))
        sharing = Sharing(neighbors=("auto",), folder=tmp_path)
        with GPUResourceManager(device, sharing=sharing) as manager:
            manager.register("tts", lambda: Weights(60 * MB), size_bytes=60 * MB)
            with pytest.raises(RequestTimeout), manager.lease("tts", timeout=1):
                pass
            assert manager._share is not None
            found = manager._share.asking
            found._find()  # the request may have ended before
            assert [(each["pid"], each["url"]) for each in found.status()] == [(pid, url)]
