"""What others do (loaders, listeners, log handlers, errors, impatient people) harms no model and no request."""

from __future__ import annotations

import logging
import math
import sys
import threading
import traceback
import weakref
from typing import Any

import pytest
import torch
from fakes import Gate, Worker, Workshop, running

from gpu_manager import GPUResourceManager, LoadTimeout, RequestCancelled, SimulatedDevice
from residency.clock import ManualClock
from residency.contracts import Memory
from residency.errors import DeviceOutOfMemory
from residency.observability import events

pytestmark = pytest.mark.usefixtures("unmeasured")


class Wordless(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize("late", ["fails", "succeeds"])
@pytest.mark.in_process("a kept part is an object of this process")
def test_a_load_that_was_given_up_leaves_the_kept_part_to_the_engine_in_force(late: str) -> None:
    clock, device, gates = ManualClock(), SimulatedDevice(1 << 30), list[Gate]()
    kept = torch.nn.Linear(100, 100)

    def load() -> torch.nn.Module:
        if gates:
            gates.pop().pass_through()
            if late == "fails":
                raise OSError("the server went away")
        engine = torch.nn.Linear(10, 10)
        engine.kept = [kept]  # type: ignore[assignment]
        return engine

    manager = GPUResourceManager(device, clock=clock)
    manager.register("tts", load, keep=kept, load_timeout=60)
    with manager.lease("tts"):
        pass
    manager.release("tts")
    gate = Gate()
    gates.append(gate)
    request = Worker(lambda: manager.lease("tts").__enter__())
    gate.wait_for_arrival()
    clock.advance(60)
    with pytest.raises(LoadTimeout):
        request.result()
    with manager.lease("tts"):
        hung = running("gpu-loading-tts")
        gate.open()
        for thread in hung:
            thread.join(60)
        assert kept.weight.untyped_storage().nbytes() == 40_000
    assert manager.close() is True
    assert device.ledger_bytes == 0


@pytest.mark.in_process("a kept part is an object of this process")
def test_a_load_that_was_given_up_and_is_not_missed_leaves_nothing_on_the_device() -> None:
    clock, device, gate = ManualClock(), SimulatedDevice(1 << 30), Gate()
    kept, hangs = torch.nn.Linear(100, 100), list[bool]()

    def load() -> torch.nn.Module:
        if hangs:
            gate.pass_through()
        engine = torch.nn.Linear(10, 10)
        engine.kept = [kept]  # type: ignore[assignment]
        return engine

    manager = GPUResourceManager(device, clock=clock)
    manager.register("tts", load, keep=kept, load_timeout=60)
    with manager.lease("tts"):
        pass
    manager.release("tts")
    hangs.append(True)
    request = Worker(lambda: manager.lease("tts").__enter__())
    gate.wait_for_arrival()
    clock.advance(60)
    with pytest.raises(LoadTimeout):
        request.result()
    hung = running("gpu-loading-tts")
    gate.open()
    for thread in hung:
        thread.join(60)
    assert device.ledger_bytes == 0
    manager.close()


def test_an_error_that_is_kept_keeps_nothing_of_what_was_half_made(manager: GPUResourceManager) -> None:
    made: list[weakref.ref[Any]] = []

    def load() -> None:
        half = torch.nn.Linear(10, 10)
        made.append(weakref.ref(half))
        try:
            raise OSError("the disk")
        except OSError as error:
            raise RuntimeError("no second half") from error

    manager.register("half", load)
    with pytest.raises(RuntimeError, match="no second half") as caught, manager.lease("half"):
        pass
    assert made[0]() is None
    assert "half = torch.nn.Linear" not in "".join(traceback.format_exception(caught.value))
    assert "in load" in "".join(traceback.format_exception(caught.value))


def test_a_device_that_fails_while_caches_are_emptied_leaves_no_model_moving(
    manager: GPUResourceManager, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    workshop.fail_next = DeviceOutOfMemory(100, 0, "a card")
    monkeypatch.setattr(manager.device, "settle", fail)
    with pytest.raises(RuntimeError, match="unspecified launch"), manager.lease("tts", timeout=60):
        pass
    monkeypatch.undo()
    with manager.lease("tts", timeout=60):
        pass


def test_a_device_that_is_lost_takes_all_models_on_it(
    manager: GPUResourceManager, workshop: Workshop, device: SimulatedDevice
) -> None:
    others = {"asr": Workshop(), "vad": Workshop()}
    for name, other in others.items():
        manager.register(name, other.load)
    manager.configure(keep_warm=-1)
    manager.configure("vad", keep_warm=0)
    for name in ("tts", *others):
        with manager.lease(name):
            pass
    device.failure = "an illegal memory access was encountered"
    with pytest.raises(RuntimeError), manager.lease("tts"):
        raise RuntimeError(f"CUDA error: {device.failure}")
    device.failure = None  # as for a new process
    for name in ("tts", *others):
        with manager.lease(name):
            pass
    assert (workshop.loads, others["asr"].loads) == (2, 2)
    assert others["vad"].loads == 1, "what lay in main memory is as good as before"


def test_a_first_load_waits_until_what_left_for_it_is_shown_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is not known yet; the driver shows the memory of an idle model as taken for a while."""

    class Late(SimulatedDevice):
        free_bytes = 50

        def memory(self) -> Memory:
            return Memory(1000, self.free_bytes, 0)

    device, clock, workshop, idle = Late(1000), ManualClock(), Workshop(), Workshop()
    looks: list[float] = []

    def wait(event: threading.Lock, timeout_s: float = math.inf) -> None:
        if threading.current_thread().name.startswith("gpu-loading-tts"):
            looks.append(clock.now())
            clock.advance(timeout_s)
            device.free_bytes += 10
        else:
            ManualClock.wait(clock, event, timeout_s)

    monkeypatch.setattr(clock, "wait", wait)
    with GPUResourceManager(device, clock=clock, adopt=workshop.adopt, keep_warm=60) as manager:
        manager.register("idle", idle.load)
        manager.register("tts", workshop.load)
        with manager.lease("idle"):
            pass
        workshop.fail_next = DeviceOutOfMemory(80, 50, "a card")
        with manager.lease("tts"):
            pass
        assert manager.status()["models"]["idle"]["state"] == "cpu"
    assert (workshop.loads, len(looks)) == (2, 3), "50 were free, 30 were lacking"


def test_an_error_without_words_leaves_no_model_moving(manager: GPUResourceManager, workshop: Workshop) -> None:
    workshop.fail_next = Wordless()
    with pytest.raises(Wordless), manager.lease("tts"):
        pass
    assert manager.status()["models"]["tts"]["last_error"] == "Wordless"
    with manager.lease("tts", timeout=60):
        pass


def test_a_log_handler_that_fails_leaves_no_model_moving(manager: GPUResourceManager) -> None:
    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise OSError("the disk of the log is full")

    moves, broken = logging.getLogger("residency.moves"), Broken()
    moves.addFilter(broken)
    moves.setLevel(logging.INFO)
    try:
        with manager.lease("tts", timeout=60):
            pass
    finally:
        moves.removeFilter(broken)
        moves.setLevel(logging.NOTSET)
    assert manager.status()["models"]["tts"]["state"] == "cpu"


def test_a_listener_that_wants_to_end_it_all_ends_nothing(manager: GPUResourceManager) -> None:
    heard: list[Any] = []
    manager.subscribe(lambda event: sys.exit(1))
    manager.subscribe(heard.append)
    with manager.lease("tts"):
        pass
    manager.close()
    assert [event.target for event in heard if event.what == "done"] == ["gpu", "cpu", "released"]


def test_a_listener_that_does_not_return_is_left_alone_at_the_end(
    manager: GPUResourceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "DELIVERY_WITHIN_S", 0.01)
    leave = threading.Event()
    manager.subscribe(lambda event: leave.wait(60))
    with manager.lease("tts"):
        pass
    assert manager.close() is True
    leave.set()


def test_of_all_models_each_is_tried_before_an_error_is_raised(manager: GPUResourceManager, workshop: Workshop) -> None:
    other = Workshop()
    manager.register("asr", other.load)
    manager.configure(keep_warm=60)
    for name in ("tts", "asr"):
        with manager.lease(name):
            pass
    workshop.resident.fail_next["offload"] = OSError("stuck")
    with pytest.raises(OSError, match="stuck"):
        manager.offload()
    models = manager.status()["models"]
    assert (models["tts"]["state"], models["asr"]["state"]) == ("gpu", "cpu")


def test_one_gap_is_learned_once(manager: GPUResourceManager, workshop: Workshop, clock: ManualClock) -> None:
    learned: list[float] = []
    with manager.lease("tts"):
        pass
    policy = manager._managed_models["tts"].policy
    object.__setattr__(policy, "idle_ended", learned.append)
    clock.advance(10)
    lease = manager.lease("tts")
    lease.cancel()
    with pytest.raises(RequestCancelled), lease:
        pass
    clock.advance(20)
    with manager.lease("tts"):
        pass
    assert learned == [10]
