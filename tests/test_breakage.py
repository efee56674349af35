"""What breaks, and how the next request is served all the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fakes import Client, Gate, Workshop, after

from gpu_manager import (
    DeviceOutOfMemory,
    Event,
    GPUResourceManager,
    LoadTimeout,
    SimulatedDevice,
    State,
)
from residency.clock import ManualClock
from residency.dispatch import OUT_OF_MEMORY_RETRIES, RETRY_AFTER_S, WARM_GRACE_S


def tts(manager: GPUResourceManager) -> dict:
    return manager.status()["models"]["tts"]


def use(manager: GPUResourceManager, name: str = "tts") -> object:
    with manager.lease(name) as engine:
        return engine


@pytest.fixture
def warm_manager(clock: ManualClock, workshop: Workshop, device: SimulatedDevice) -> Iterator[GPUResourceManager]:
    """Like ``manager``; its models stay on the device for an hour and are never released."""
    with GPUResourceManager(
        device, keep_warm=3600, idle_timeout=-1, clock=clock, adopt=workshop.adopt
    ) as manager:  # fmt: skip
        manager.register("tts", workshop.load)
        yield manager


# -- what breaks ------------------------------------------------------------------------------------------------


def test_a_loader_that_takes_too_long_is_given_up_and_what_it_brings_is_thrown_away(
    manager: GPUResourceManager, clock: ManualClock
) -> None:
    workshop = Workshop()
    manager.register("asr", workshop.load, load_timeout="2m")
    gate = workshop.gate = Gate()
    told: list[Event] = []
    manager.subscribe(told.append)
    client = Client(manager, "asr").queues()
    gate.wait_for_arrival()
    clock.advance(119)
    assert client.worker.is_alive()
    with pytest.raises(LoadTimeout) as caught:
        after(clock, 1, client.worker)
    assert (caught.value.name, caught.value.allowed_s) == ("asr", 120)
    asr = manager.status()["models"]["asr"]
    assert (asr["state"], asr["progress"], asr["device_bytes"]) == ("released", None, 0)
    assert asr["last_error"].startswith("LoadTimeout")
    engine = use(manager, "asr")
    gate.open()
    assert workshop.loads == 2
    assert use(manager, "asr") is engine
    manager.close()
    assert [event.what for event in told if event.what != "progress"][:3] == ["began", "failed", "began"]


@pytest.mark.parametrize("how", ["discard", "device lost"])
def test_a_broken_engine_is_dropped_when_its_request_ends(
    how: str, warm_manager: GPUResourceManager, workshop: Workshop
) -> None:
    lease = warm_manager.lease("tts")
    try:
        with lease:
            if how == "discard":
                lease.discard()
            else:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
    except RuntimeError:
        pass
    assert tts(warm_manager)["state"] == "released"
    assert workshop.resident.place == "nowhere"
    use(warm_manager)
    assert workshop.loads == 2
    assert tts(warm_manager)["state"] == "gpu"


def test_a_full_device_is_tried_once_more_and_then_the_error_is_told(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    workshop.fail_next = DeviceOutOfMemory(100, 0, "a card")
    assert use(manager)
    assert workshop.loads == 2
    manager.release()

    def full() -> object:
        workshop.loads += 1
        raise DeviceOutOfMemory(100, 40, "a card")

    manager.register("asr", full)
    with pytest.raises(DeviceOutOfMemory, match="a card") as caught:
        use(manager, "asr")
    assert caught.value.free_bytes == 40
    assert workshop.loads == 4
    assert OUT_OF_MEMORY_RETRIES > 1


def test_who_finds_the_device_full_sends_idle_models_away_and_tries_again(
    warm_manager: GPUResourceManager, workshop: Workshop
) -> None:
    tries: list[str] = []

    def load() -> object:
        tries.append(tts(warm_manager)["state"])
        if len(tries) == 1:
            raise DeviceOutOfMemory(100, 40, "a card")
        return Workshop().load()

    warm_manager.register("asr", load)
    use(warm_manager)
    use(warm_manager, "asr")
    assert tries == ["gpu", "cpu"]
    assert warm_manager.status()["models"]["asr"]["last_error"] is None


def test_make_room_sends_away_what_is_idle_and_not_pinned(warm_manager: GPUResourceManager) -> None:
    for name, keep_warm in (("idle", 3600), ("busy", 3600), ("pinned", -1), ("resting", 0)):
        warm_manager.register(name, Workshop().load, keep_warm=keep_warm)
        use(warm_manager, name)
    busy = Client(warm_manager, "busy").comes_in()
    with warm_manager.lease("tts"):
        warm_manager.make_room("tts")
        states = {name: model["state"] for name, model in warm_manager.status()["models"].items()}
    assert states == {"tts": "gpu", "idle": "cpu", "busy": "gpu", "pinned": "gpu", "resting": "cpu"}
    busy.leaves()
    assert warm_manager.status()["models"]["busy"]["state"] == "gpu"


def test_after_a_failed_offload_the_monitor_tries_again_later(manager: GPUResourceManager, clock: ManualClock) -> None:
    with manager.lease("tts") as engine:
        engine.resident.fail_next["offload"] = MemoryError("no room")
    assert tts(manager)["next"] == {"to": "cpu", "in_s": RETRY_AFTER_S}
    assert tts(manager)["last_error"] == "MemoryError: no room"


def test_a_model_that_was_warmed_waits_for_its_request(manager: GPUResourceManager, clock: ManualClock) -> None:
    manager.warm()
    assert manager.wait_for("tts", State.DEVICE, 10)
    assert tts(manager)["next"] == {"to": "cpu", "in_s": WARM_GRACE_S}
    clock.advance(50)
    assert manager.warm() is True
    assert tts(manager)["next"] == {"to": "cpu", "in_s": WARM_GRACE_S}
    use(manager)
    assert tts(manager)["state"] == "cpu", "its request has been"
