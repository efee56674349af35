"""Neighbours that are asked for room: real servers of this test that hold memory of a simulated card."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from local_server import serving

from gpu_manager import GPUResourceManager, RequestTimeout, Sharing, SimulatedDevice, State
from residency.errors import InvalidInput, NeighborUnreachable

MB = 1 << 20
CAPACITY = 100 * MB


class Vllm:
    """A server with vLLM's calls for sleep, which holds memory of a card while it is awake."""

    pids = itertools.count(900_000_000)

    def __init__(self, device: SimulatedDevice, nbytes: int) -> None:
        self.device, self.nbytes, self.pid = device, nbytes, next(self.pids)
        self.running, self.asleep, self.calls, self.url = 0, False, list[str](), ""
        self.woken = threading.Event()
        device.report_outside(self.pid, nbytes)

    def answer(self, path: str) -> str:
        if path == "/is_sleeping":
            return json.dumps({"is_sleeping": self.asleep})
        if path == "/metrics":
            return f"vllm:num_requests_running {self.running}\nvllm:num_requests_waiting 0\n"
        self.calls.append(path)
        self.asleep = path == "/sleep"
        self.device.report_outside(self.pid, 0 if self.asleep else self.nbytes)
        if not self.asleep:
            self.woken.set()
        return ""


@contextmanager
def vllm(device: SimulatedDevice, nbytes: int) -> Iterator[Vllm]:
    server = Vllm(device, nbytes)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = server.answer(self.path.partition("?")[0]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listening.server_port}"
    with serving(listening):
        yield server


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice(CAPACITY)


class Weights:
    def __init__(self, nbytes: int) -> None:
        self.weights = torch.arange(nbytes, dtype=torch.uint8)


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
