"""The ends of workers and of their server, in each phase of a model: nothing is left, and the next request works."""

from __future__ import annotations

import os
import pickle
import select
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import psutil
import pytest
from worker_engines import LINUX, Gate, Staged, await_threads, held, started

from gpu_manager import GPUResourceManager, SimulatedDevice, State
from residency.errors import WorkerDied
from residency.workers import process
from tts_gpu_managed import GPUManagedTTS

pytestmark = LINUX

PHASES = ("idle", "load", "restore", "offload", "release", "call", "stream")
WAYS = {"killed": "SIGKILL", "crashed": "SIGSEGV", "exited": "code 3", "hanging": "did not react", "orphaned": "server"}


@pytest.fixture(scope="module")
def manager() -> Iterator[GPUResourceManager]:
    device = SimulatedDevice(1 << 30)
    pickle.dumps(device)  # its books are shared from now on
    before, known = held(), threading.enumerate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "PING_EVERY_S", 0.1)
        with GPUResourceManager(device, isolation="process", keep_warm=-1) as manager:
            manager._isolation._hangs_after_s = 3.0
            yield manager
    await_threads(known)
    assert held() == before


def server_of(manager: GPUResourceManager) -> int:
    return manager._isolation._spawner._server._process.pid


def end(manager: GPUResourceManager, pid: int, way: str, gate: Gate, phase: str) -> None:
    if way == "exited":
        gate.open(b"exit")
    else:
        number = {"crashed": signal.SIGSEGV, "hanging": signal.SIGSTOP}.get(way, signal.SIGKILL)
        os.kill(server_of(manager) if way == "orphaned" else pid, number)


def begin(tts: GPUManagedTTS, phase: str) -> Future[Any] | None:
    """Begins a phase of a model; returns the request that fails with the worker."""
    manager = tts.manager
    if phase != "load":
        assert tts.volume == 1.0
    if phase == "restore":
        manager.offload(tts.name)
    if phase == "offload":
        return started(manager.offload, tts.name)
    if phase == "release":
        return started(manager.release, tts.name)
    if phase == "stream":
        stream = tts.steps()
        assert next(stream) == 1
        return started(next, stream)
    return started(lambda: tts.speak())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("phase", PHASES)
def test_an_end_in_each_phase(
    manager: GPUResourceManager, gate: Gate, phase: str, way: str, request: pytest.FixtureRequest
) -> None:
    if phase == "idle" and way in ("exited", "hanging"):
        pytest.skip("the engine does nothing")
    tts = GPUManagedTTS(None, manager=manager, load=lambda: Staged(phase, gate), name="tts")
    request.addfinalizer(tts.close)
    if phase == "idle":
        running, pid = None, tts.pid()
        os.kill(server_of(manager) if way == "orphaned" else pid, signal.SIGSEGV if way == "crashed" else 9)
    else:
        running = begin(tts, phase)
        pid = gate.reached()
        end(manager, pid, way, gate, phase)
    if phase in ("load", "restore", "call", "stream"):
        with pytest.raises(WorkerDied, match=WAYS[way]):
            running.result(60)
    elif running is not None:
        with suppress(WorkerDied):
            running.result(60)
    assert manager.wait_for("tts", State.RELEASED, 60)
    await_ended(pid)
    model = manager.status()["models"]["tts"]
    assert (model["state"], model["device_bytes"], model["host_bytes"]) == ("released", 0, 0)
    assert manager.device_lost is None
    assert tts.speak() == "spoken"


def test_a_request_right_after_an_end_gets_a_new_worker(
    manager: GPUResourceManager, gate: Gate, request: pytest.FixtureRequest
) -> None:
    tts = GPUManagedTTS(None, manager=manager, load=lambda: Staged("never", gate), name="tts")
    request.addfinalizer(tts.close)
    pid, server = tts.pid(), server_of(manager)
    os.kill(server, signal.SIGSTOP)  # cannot tell of the end
    os.kill(pid, signal.SIGKILL)
    poller = select.poll()
    poller.register(fd := os.pidfd_open(pid), select.POLLIN)
    poller.poll(60_000)
    os.close(fd)
    assert not manager._managed_models["tts"].resident.usable
    os.kill(server, signal.SIGCONT)
    assert tts.pid() != pid


def await_ended(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(30)


def test_nothing_is_left_of_many_ends(manager: GPUResourceManager, new_gate: Callable[[], Gate]) -> None:
    before: dict[str, Any] = {}
    known = threading.enumerate()
    for number in range(6):
        gate = new_gate()
        tts = GPUManagedTTS(None, manager=manager, load=lambda gate=gate: Staged("call", gate), name="tts")
        running = started(lambda tts=tts: tts.speak())
        os.kill(gate.reached(), signal.SIGKILL)
        with pytest.raises(WorkerDied):
            running.result(60)
        assert tts.speak() == "spoken"
        tts.close()
        await_threads(known)
        if number == 1:
            before = held()
    assert held() == before
