"""Objects that move themselves and fail half-way: they are moved back or replaced, and none outlives its process."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.errors import SelfMoveFailed, SharedWeights


@pytest.fixture
def manager() -> Iterator[GPUResourceManager]:
    with GPUResourceManager(SimulatedDevice(1 << 30), keep_warm=-1) as manager:
        yield manager


class Part:
    """Fails once in each move of ``faults``, when half of it has moved."""

    def __init__(self) -> None:
        self.place = "gpu"
        self.faults: dict[str, BaseException] = {}
        self.child: subprocess.Popen[bytes] | None = None

    def _move(self, name: str, place: str) -> None:
        fault = self.faults.pop(name, None)
        self.place = "half-moved" if fault else place
        if fault:
            raise fault

    def offload_from_gpu(self) -> None:
        self._move("offload", "main memory")

    def restore_to_gpu(self) -> None:
        self._move("restore", "gpu")

    def release_from_gpu(self) -> None:
        self._move("release", "nowhere")


def load(manager: GPUResourceManager) -> list[Part]:
    built: list[Part] = []

    def build() -> list[Part]:
        built.append(Part())
        return [built[-1]]

    manager.register("tts", build)
    place(manager)
    return built


def place(manager: GPUResourceManager, name: str = "tts") -> str:
    with manager.lease(name) as engine:
        return str(engine[0].place)


@pytest.mark.in_process("looks at objects of the engine without a lease")
def test_an_offload_that_fails_half_way_is_undone(manager: GPUResourceManager) -> None:
    built = load(manager)
    built[0].faults["offload"] = RuntimeError("half of it")
    with pytest.raises(SelfMoveFailed, match="half of it"):
        manager.offload("tts")
    assert place(manager) == "gpu"
    assert len(built) == 1


@pytest.mark.in_process("looks at objects of the engine without a lease")
def test_an_object_that_cannot_be_moved_back_is_replaced_for_the_next_request(manager: GPUResourceManager) -> None:
    built = load(manager)
    built[0].faults = {"offload": RuntimeError("half of it"), "restore": RuntimeError("nor back")}
    with pytest.raises(SelfMoveFailed, match="half of it"):
        manager.offload("tts")
    assert place(manager) == "gpu"
    assert len(built) == 2


@pytest.mark.parametrize(
    "error", [MemoryError(), SystemExit(3), GeneratorExit()], ids=lambda error: type(error).__name__
)
@pytest.mark.in_process("looks at objects of the engine without a lease")
def test_a_restore_that_fails_half_way_with_any_error_is_undone(
    manager: GPUResourceManager, error: BaseException
) -> None:
    built = load(manager)
    manager.offload("tts")
    built[0].faults["restore"] = error
    with pytest.raises((SelfMoveFailed, type(error))) as raised:
        place(manager)
    assert built[0].place == "main memory"
    assert type(error).__name__ in repr(raised.value), "an error without a message is named by its type"
    assert place(manager) == "gpu"


@pytest.mark.in_process("looks at objects of the engine without a lease")
def test_worker_processes_end_whatever_the_release_raises(manager: GPUResourceManager) -> None:
    part = Part()
    part.child = subprocess.Popen(["sleep", "infinity"])
    part.faults["release"] = SystemExit(3)
    manager.register("tts", lambda: [part])
    place(manager)
    with pytest.raises(SystemExit):
        manager.release("tts")
    assert part.child.poll() is not None


@pytest.mark.in_process("looks at objects of the engine without a lease")
def test_an_asynchronous_function_is_no_move(manager: GPUResourceManager) -> None:
    class Asynchronous(Part):
        async def offload_from_gpu(self) -> None:  # type: ignore[override]
            raise AssertionError("never awaited")

    manager.register("tts", lambda: [Asynchronous()])
    place(manager)
    with pytest.raises(SelfMoveFailed, match="asynchronous"):
        manager.offload("tts")
    assert manager.status()["models"]["tts"]["state"] == "gpu"


@pytest.mark.in_process("looks at objects of the engine without a lease")
def test_an_object_of_two_models_is_refused_as_tensors_are(manager: GPUResourceManager) -> None:
    (part,) = load(manager)
    manager.register("other", lambda: {"shared": part})
    with pytest.raises(SharedWeights, match="shared"), manager.lease("other"):
        pass
    assert place(manager) == "gpu"
    manager.release("tts")
    part.place = "gpu"
    with manager.lease("other"):
        pass


ENDS = """
import os, signal, subprocess, sys
from gpu_manager import GPUResourceManager, SimulatedDevice

class Part:
    def __init__(self):
        self.child = subprocess.Popen(["sleep", "infinity"], stdout=subprocess.DEVNULL)

    def offload_from_gpu(self): ...
    def restore_to_gpu(self): ...

manager = GPUResourceManager(SimulatedDevice(1 << 30), keep_warm=-1)
manager.register("tts", Part)
with manager.lease("tts") as part:
    print(part.child.pid, flush=True)
sys.stdin.readline()
{end}
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux only")
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(1)"])
def test_worker_processes_end_with_a_process_that_is_killed(end: str) -> None:
    command = [sys.executable, "-c", ENDS.format(end=end)]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        worker = os.pidfd_open(int(process.stdout.readline()))
        try:
            print(file=process.stdin, flush=True)
            process.wait(60)
            assert select.select([worker], [], [], 30)[0], "it runs on"
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(worker, signal.SIGKILL)
            os.close(worker)


@pytest.mark.in_process("looks at objects of the engine without a lease")
def test_a_watcher_that_cannot_be_started_is_reported(
    manager: GPUResourceManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    part = Part()
    part.child = subprocess.Popen(["sleep", "infinity"])
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    manager.register("tts", lambda: [part])
    with caplog.at_level(logging.WARNING):
        assert place(manager) == "gpu"
    assert f"the processes {part.child.pid} must be ended by hand" in caplog.text
    manager.release("tts")
    assert part.child.poll() is not None
