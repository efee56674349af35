from __future__ import annotations

from fakes import Gate, Workshop, await_that

from gpu_manager import GPUResourceManager, State
from residency.clock import ManualClock
from residency.scheduling.dispatcher import WARM_GRACE_S
from residency.web.ui.prewarm import EVERY_S, Prewarm


def test_intent_brings_the_model_back_and_without_a_request_it_leaves_as_always(
    manager: GPUResourceManager, clock: ManualClock
) -> None:
    with manager.lease("tts"):
        pass
    Prewarm(manager, "tts", clock.now).show()
    assert manager.wait_for("tts", State.DEVICE, 30)
    clock.advance(WARM_GRACE_S - 1)
    assert manager.status()["models"]["tts"]["next"] == {"to": "cpu", "in_s": 1.0}
    clock.advance(1)
    assert manager.wait_for("tts", State.HOST, 30)
    clock.advance(600)
    assert manager.wait_for("tts", State.RELEASED, 30)


def test_it_waits_for_nothing(manager: GPUResourceManager, workshop: Workshop, clock: ManualClock) -> None:
    workshop.gate = gate = Gate()
    Prewarm(manager, "tts", clock.now).show()
    gate.wait_for_arrival()
    assert manager.status()["models"]["tts"]["state"] == "moving"
    gate.open()
    assert manager.wait_for("tts", State.DEVICE, 30)


def test_many_keys_are_one_intent_for_a_while(manager: GPUResourceManager, clock: ManualClock) -> None:
    told: list[str] = []
    manager.warm = lambda name=None, if_idle=False: bool(told.append(name))  # type: ignore[method-assign]
    intent = Prewarm(manager, "tts", clock.now)
    for _ in range(20):
        intent.show()
    assert told == ["tts"]
    clock.advance(EVERY_S)
    intent.show()
    assert told == ["tts", "tts"]


def test_it_asks_nothing_of_a_model_in_use(manager: GPUResourceManager, clock: ManualClock) -> None:
    with manager.lease("tts"):
        Prewarm(manager, "tts", clock.now).show()
    assert manager.status()["models"]["tts"]["state"] == "cpu"


def test_a_loader_that_fails_is_left_to_requests(
    manager: GPUResourceManager, workshop: Workshop, clock: ManualClock
) -> None:
    intent = Prewarm(manager, "tts", clock.now)
    workshop.fail_next = OSError("no disk")
    intent.show()
    managed = manager._managed_models["tts"]
    assert await_that(manager, managed, lambda: managed.faults.last_error is not None)
    clock.advance(EVERY_S)
    intent.show()
    assert workshop.loads == 1
    with manager.lease("tts"):
        assert workshop.loads == 2


def test_it_never_raises(manager: GPUResourceManager, clock: ManualClock) -> None:
    Prewarm(manager, "asr", clock.now).show()
    manager.close()
    Prewarm(manager, "tts", clock.now).show()
