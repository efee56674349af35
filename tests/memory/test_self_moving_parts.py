"""An object that moves itself, alone: failed moves are undone, sizes are differences, workers are only its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from gpu_manager import SimulatedDevice
from residency.errors import DeviceOutOfMemory, SelfMoveFailed
from residency.memory.self_moving import OwnMoves
from residency.memory.self_moving import workers as worker_processes
from residency.memory.self_moving.part import SelfMovingPart
from residency.memory.self_moving.workers import workers_of
from residency.observability.process_memory import is_claimed

MB = 1 << 20
HELD = 200 * MB


class Native:
    """Holds memory of the card in this process, as native code does; ``error`` makes its restore fail half-way."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device, self.error = device, ""
        self.copy = b""
        device.report_outside(os.getpid(), HELD)

    def offload(self) -> None:
        self.device.report_outside(os.getpid(), 0)
        self.copy = b"w" * (64 * MB)

    def restore(self) -> None:
        self.device.report_outside(os.getpid(), HELD // 2)
        if self.error:
            raise RuntimeError(self.error)
        self.device.report_outside(os.getpid(), HELD)
        self.copy = b""


MOVES = OwnMoves(lambda thing: thing.offload(), lambda thing: thing.restore())


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice(1 << 30)


def part_of(thing: Any, device: SimulatedDevice) -> SelfMovingPart:
    return SelfMovingPart(".llm", thing, MOVES, device)


def test_without_worker_processes_the_first_offload_shows_the_size(device: SimulatedDevice) -> None:
    part = part_of(Native(device), device)
    assert part.device_bytes == 0
    for _ in range(2):
        assert part.offload() == HELD
        assert part.device_bytes == 0
        assert part.host_bytes == pytest.approx(64 * MB, abs=8 * MB)
        assert part.restore() == HELD
        assert (part.device_bytes, part.host_bytes) == (HELD, 0)


@pytest.mark.parametrize(
    ("said", "error"), [("CUDA error: out of memory", DeviceOutOfMemory), ("an error", SelfMoveFailed)]
)
def test_a_restore_that_fails_half_way_is_undone(device: SimulatedDevice, said: str, error: type[Exception]) -> None:
    thing = Native(device)
    part = part_of(thing, device)
    part.offload()
    thing.error = said
    with pytest.raises(error):
        part.restore()
    assert device.memory().free_bytes == 1 << 30, "nothing of it is left there"
    thing.error = ""
    assert part.restore() == HELD


@pytest.fixture
def stubborn() -> Iterator[subprocess.Popen[str]]:
    """A worker process with a process of its own, as with several GPUs; both ignore SIGTERM."""
    script = "trap '' TERM; sleep 1000 & echo ready; wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        for each in workers_of(process):
            each.kill()


def test_a_release_ends_the_processes_of_workers_too_though_they_ignore_sigterm(
    device: SimulatedDevice, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_processes._wait, "__defaults__", (0.2,))
    thing = SimpleNamespace(engine=[{"core": stubborn}])
    found = workers_of(thing)
    assert len(found) == 2
    part = part_of(thing, device)
    assert all(map(is_claimed, found))
    part.release()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in found)


def test_what_is_managed_no_longer_is_left_alone_and_not_accounted_for(
    device: SimulatedDevice, stubborn: subprocess.Popen[str]
) -> None:
    part = part_of(SimpleNamespace(core=stubborn), device)
    found = workers_of(stubborn)
    part.end_management()
    assert not any(map(is_claimed, found))
    assert all(process.is_running() for process in found)
    assert (part.device_bytes, part.host_bytes) == (0, 0)


def test_a_process_that_is_no_child_is_no_worker() -> None:
    assert workers_of(SimpleNamespace(parent=psutil.Process(os.getppid()), own=psutil.Process())) == []
