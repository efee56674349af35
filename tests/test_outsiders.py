"""What others do (loaders, listeners, log handlers, errors, impatient people) harms no model and no request."""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any

import pytest
import torch
from fakes import Gate, Worker, Workshop, running

from gpu_manager import GPUResourceManager, LoadTimeout, RequestCancelled, SimulatedDevice
from residency import events
from residency.clock import ManualClock


class Wordless(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize("late", ["fails", "succeeds"])
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
    monkeypatch.setattr(events, "TOLD_WITHIN_S", 0.01)
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
    policy = manager._slots["tts"].policy
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
