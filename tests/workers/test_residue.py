"""What an offloaded worker leaves on the device, and its checkpoints, on a simulated card that knows processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from worker_engines import LINUX, speak

from gpu_manager import CpuDevice, DeviceOutOfMemory, GPUResourceManager, SimulatedDevice
from residency.devices.simulated_checkpoints import SimulatedCheckpoints
from residency.errors import CheckpointFailed, InvalidInput, SelfMoveFailed, WorkerDied
from residency.sentences import Sentence
from residency.workers.residue import ProcessResidue

pytestmark = LINUX

MB = 1 << 20
CONTEXT_BYTES = 100 * MB


class Engine:
    def __init__(self) -> None:
        self.weights = torch.arange(1 << 18, dtype=torch.float32)

    def __call__(self) -> float:
        return float(self.weights[-1])


class Immovable(Engine):
    """Has a part that cannot leave the device by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Stuck()


class Stuck:
    def offload_from_gpu(self) -> None:
        raise RuntimeError("captured graphs")

    def restore_to_gpu(self) -> None: ...


class WithChild(Engine):
    """Has a child process with a context of its own."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        self.child = context.Process(target=_hold, args=(device, there), daemon=True)
        self.child.start()
        there.close()
        assert here.recv() == "ready"
        self.connection = here

    def child_pid(self) -> int:
        assert self.child.pid is not None
        return self.child.pid


def _hold(device: SimulatedDevice, connection: Any) -> None:
    device.ensure_usable()
    connection.send("ready")
    with contextlib.suppress(EOFError):
        connection.recv()


@pytest.fixture(scope="module")
def shared() -> Iterator[GPUResourceManager]:
    """One manager for the module: its fork server takes seconds to start."""
    with GPUResourceManager(SimulatedDevice(1 << 30, context_bytes=CONTEXT_BYTES), isolation="process") as manager:
        yield manager


@pytest.fixture
def manager(shared: GPUResourceManager) -> Iterator[GPUResourceManager]:
    yield shared
    checkpoints = checkpoints_of(shared)
    checkpoints.failure.clear()
    checkpoints.leaves.clear()
    for name in shared.names():
        shared.unregister(name)
    assert shared.device.memory().process_bytes == 0


@pytest.fixture
def card(manager: GPUResourceManager) -> SimulatedDevice:
    card = manager.device._device
    assert isinstance(card, SimulatedDevice)
    return card


def checkpoints_of(manager: GPUResourceManager) -> SimulatedCheckpoints:
    assert manager._isolation is not None
    checkpoints = manager._isolation._checkpoints
    assert isinstance(checkpoints, SimulatedCheckpoints)
    return checkpoints


def worker(manager: GPUResourceManager) -> Any:
    return manager.status()["models"]["tts"]["worker"]


@pytest.mark.parametrize("residue", ["auto", "checkpoint"])
def test_an_offload_and_a_release_leave_nothing_on_the_card(residue: Any) -> None:
    card = SimulatedDevice(1 << 30, context_bytes=CONTEXT_BYTES)
    with GPUResourceManager(card, isolation="process", residue=residue) as manager:
        manager.register("tts", Engine)
        for _ in range(2):
            assert speak(manager) == (1 << 18) - 1
            manager.offload("tts")
            assert card.memory().process_bytes == 0
            assert worker(manager)["checkpointed"]
            assert worker(manager)["last_offload"]["way"] == "weights+checkpoint"
        manager.warm("tts")
        with manager.lease("tts"):
            assert card.memory().process_bytes == CONTEXT_BYTES + MB
            assert not worker(manager)["checkpointed"]
            assert worker(manager)["context_bytes"] == CONTEXT_BYTES
        manager.release("tts")
        assert worker(manager) is None
        assert card.memory().process_bytes == 0


def test_without_checkpoints_the_context_stays_until_the_release() -> None:
    card = SimulatedDevice(1 << 30, context_bytes=CONTEXT_BYTES)
    with GPUResourceManager(card, isolation="process", residue="keep") as manager:
        manager.register("tts", Engine)
        speak(manager)
        manager.offload("tts")
        assert card.memory().process_bytes == CONTEXT_BYTES
        assert worker(manager)["last_offload"]["way"] == "weights"
        manager.release("tts")
        assert card.memory().process_bytes == 0


def test_an_engine_that_cannot_be_moved_is_checkpointed_as_a_whole(
    manager: GPUResourceManager, card: SimulatedDevice
) -> None:
    manager.register("tts", Immovable)
    for _ in range(2):
        assert speak(manager) == (1 << 18) - 1
        manager.offload("tts")
        status = manager.status()["models"]["tts"]
        assert card.memory().process_bytes == 0
        assert worker(manager)["last_offload"]["way"] == "checkpoint"
        assert worker(manager)["last_offload"]["checkpoint_bytes"] == MB + CONTEXT_BYTES
        assert (status["state"], status["device_bytes"], status["host_bytes"]) == ("cpu", 0, MB)


def test_the_child_processes_of_a_worker_are_checkpointed_too(
    manager: GPUResourceManager, card: SimulatedDevice
) -> None:
    manager.register("tts", lambda: WithChild(card))
    with manager.lease("tts") as engine:
        child = psutil.Process(engine.child_pid())
        assert card.memory().process_bytes == 2 * CONTEXT_BYTES + MB
    manager.offload("tts")
    assert card.memory().process_bytes == 0
    assert speak(manager) == (1 << 18) - 1
    manager.release("tts")
    assert not child.is_running()


@pytest.mark.parametrize("step", ["lock", "checkpoint"])
def test_a_checkpoint_that_fails_leaves_the_context_and_the_worker(
    manager: GPUResourceManager, card: SimulatedDevice, step: Any
) -> None:
    manager.register("tts", Engine)
    speak(manager)
    manager.offload("tts")
    checkpoints_of(manager).failure[step] = "busy"
    pid = worker(manager)["pid"]
    speak(manager)
    manager.offload("tts")
    assert card.memory().process_bytes == CONTEXT_BYTES
    assert worker(manager)["last_offload"]["way"] == "weights"
    del checkpoints_of(manager).failure[step]
    assert speak(manager) == (1 << 18) - 1
    manager.offload("tts")
    assert card.memory().process_bytes == 0
    assert worker(manager)["pid"] == pid


def test_a_driver_that_refuses_checkpoints_is_not_asked_again(
    manager: GPUResourceManager, card: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = checkpoints_of(manager)
    asked: list[int] = []
    monkeypatch.setattr(checkpoints, "unavailable", lambda: Sentence("not permitted", "不允许"))
    monkeypatch.setattr(checkpoints, "checkpoint", lambda pid, timeout_s: asked.append(pid))
    manager.register("tts", Engine)
    speak(manager)
    assert manager.offload("tts")
    assert worker(manager)["last_offload"]["way"] == "weights"
    manager.register("immovable", Immovable)
    with manager.lease("immovable") as engine:
        assert engine() == (1 << 18) - 1
    with pytest.raises(SelfMoveFailed):
        manager.offload("immovable")
    assert card.memory().process_bytes == 2 * CONTEXT_BYTES + MB
    assert not asked


@pytest.mark.parametrize("left", ["failed", "gone"])
@pytest.mark.parametrize("step", ["lock", "checkpoint"])
def test_a_worker_that_its_checkpoint_breaks_is_replaced(
    manager: GPUResourceManager, card: SimulatedDevice, step: Any, left: Any
) -> None:
    manager.register("tts", Engine, keep_warm=-1)
    speak(manager)
    checkpoints = checkpoints_of(manager)
    checkpoints.failure[step], checkpoints.leaves[step] = "driver error", left
    with pytest.raises(WorkerDied):
        manager.offload("tts")
    checkpoints.failure.clear()
    assert speak(manager) == (1 << 18) - 1
    manager.offload("tts")
    assert card.memory().process_bytes == 0


@pytest.mark.parametrize("step", ["restore", "unlock"])
def test_a_worker_that_cannot_be_resumed_is_replaced(
    manager: GPUResourceManager, card: SimulatedDevice, step: Any
) -> None:
    manager.register("tts", Engine, keep_warm=-1)
    speak(manager)
    manager.offload("tts")
    checkpoints = checkpoints_of(manager)
    checkpoints.failure[step], checkpoints.leaves[step] = "driver error", "failed"
    with pytest.raises(WorkerDied, match="driver error"):
        speak(manager)
    checkpoints.failure.clear()
    assert speak(manager) == (1 << 18) - 1


def test_a_full_card_keeps_the_checkpoint_for_another_try(manager: GPUResourceManager, card: SimulatedDevice) -> None:
    manager.register("tts", Engine)
    speak(manager)
    manager.offload("tts")
    pid = worker(manager)["pid"]
    card.report_outside(os.getpid(), (1 << 30) - CONTEXT_BYTES // 2)
    with pytest.raises((CheckpointFailed, DeviceOutOfMemory)):
        speak(manager)
    assert worker(manager)["checkpointed"]
    card.report_outside(os.getpid(), 0)
    assert speak(manager) == (1 << 18) - 1
    assert worker(manager)["pid"] == pid


def test_a_worker_that_is_killed_while_it_is_checkpointed_is_replaced(
    manager: GPUResourceManager, card: SimulatedDevice
) -> None:
    manager.register("tts", Engine)
    speak(manager)
    manager.offload("tts")
    process = psutil.Process(worker(manager)["pid"])
    process.send_signal(signal.SIGKILL)
    psutil.wait_procs([process])
    with contextlib.suppress(WorkerDied):  # the request that notices it
        speak(manager)
    assert speak(manager) == (1 << 18) - 1


class Halves:
    """Checkpoints one process, fails at the next, and finds no room to restore the first."""

    def checkpoint(self, pid: int, timeout_s: float) -> None:
        if pid == 2:
            raise CheckpointFailed(pid, "lock", "busy")

    def restore(self, pid: int, timeout_s: float) -> None:
        raise CheckpointFailed(pid, "restore", "full")

    def state(self, pid: int) -> str:
        return "checkpointed" if pid == 1 else "running"


def test_a_worker_of_which_half_stays_checkpointed_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    worker: Any = SimpleNamespace(pid=1, checkpointed=False, kill=ended.append)
    halves: Any = Halves()
    residue = ProcessResidue(worker, halves, SimulatedDevice(1 << 30))
    monkeypatch.setattr(residue, "_holders", lambda: [1, 2])
    with pytest.raises(CheckpointFailed, match="busy"):
        residue.remove()
    assert len(ended) == 1
    assert not worker.checkpointed


def test_checkpoints_need_worker_processes() -> None:
    with pytest.raises(InvalidInput, match="needs --gpu-isolation process"):
        GPUResourceManager(SimulatedDevice(1 << 30), isolation="none", residue="checkpoint")


def test_checkpoints_can_be_required() -> None:
    with pytest.raises(InvalidInput, match="cannot be checkpointed"):
        GPUResourceManager(CpuDevice(), isolation="process", residue="checkpoint")
