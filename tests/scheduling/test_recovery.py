"""What breaks, and how the next request is served all the same."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import suppress

import pytest
from fakes import Client, Gate, Worker, Workshop, after, await_that, comes_to, running

from gpu_manager import (
    CpuDevice,
    DeviceLost,
    DeviceOutOfMemory,
    Event,
    GPUResourceManager,
    LoadTimeout,
    SimulatedDevice,
    State,
)
from residency.clock import ManualClock
from residency.errors import CaptureUnderWay
from residency.locks import owned_by_this_thread
from residency.scheduling.dispatcher import RETRY_AFTER_S, WARM_GRACE_S
from residency.scheduling.move_runner import CAPTURE_WITHIN_S, OUT_OF_MEMORY_RETRIES

pytestmark = pytest.mark.usefixtures("unmeasured")


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


def test_a_loader_that_was_given_up_is_not_run_again_when_it_meets_a_full_device(
    manager: GPUResourceManager, clock: ManualClock
) -> None:
    gate, workshop, calls = Gate(), Workshop(), list[int]()

    def load() -> object:
        calls.append(1)
        if len(calls) == 1:
            gate.pass_through()
            raise DeviceOutOfMemory(10, 0, "the card")
        return workshop.load()

    manager.register("asr", load, load_timeout="2m")
    client = Client(manager, "asr").queues()
    gate.wait_for_arrival()
    with pytest.raises(LoadTimeout):
        after(clock, 120, client.worker)
    with manager.lease("asr"):
        hung = running("gpu-loading-asr")
        gate.open()
        for thread in hung:
            thread.join(60)
        assert len(calls) == 2
    assert manager.close() is True


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
    assert manager.status()["monitor"]["errors"] == 0
    manager.close()
    told = [event for event in told if event.what not in ("progress", "queue")]
    assert [event.what for event in told][:3] == ["began", "failed", "began"]
    assert told[1].error.startswith("LoadTimeout: 'asr' was not loaded within 120 s")


@pytest.mark.parametrize("how", ["discard", "device lost"])
def test_a_broken_engine_is_dropped_when_its_request_ends(
    how: str, warm_manager: GPUResourceManager, workshop: Workshop, device: SimulatedDevice
) -> None:
    lease = warm_manager.lease("tts")
    try:
        with lease:
            if how == "discard":
                lease.discard()
            else:
                device.failure = "an illegal memory access was encountered"
                raise RuntimeError(f"CUDA error: {device.failure}")
    except RuntimeError:
        pass
    assert tts(warm_manager)["state"] == "released"
    assert workshop.resident.place == "nowhere"
    device.failure = None
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


def test_a_full_device_is_tried_again_while_other_models_come_and_go(
    manager: GPUResourceManager, clock: ManualClock
) -> None:
    tries: list[int] = []

    def load() -> object:
        tries.append(1)
        use(manager, "tts")
        raise DeviceOutOfMemory(100, 40, "a card")

    manager.register("asr", load)
    with pytest.raises(DeviceOutOfMemory, match="a card"):
        use(manager, "asr")
    assert len(tries) == 1 + OUT_OF_MEMORY_RETRIES


def test_after_a_refusal_the_next_request_sends_nobody_away(warm_manager: GPUResourceManager) -> None:
    workshop, full = Workshop(), [True]

    def load() -> object:
        if full:
            raise DeviceOutOfMemory(100, 40, "a card")
        return workshop.load()

    warm_manager.register("asr", load)
    with pytest.raises(DeviceOutOfMemory):
        use(warm_manager, "asr")
    full.clear()
    use(warm_manager, "tts")
    use(warm_manager, "asr")
    assert tts(warm_manager)["state"] == "gpu"


def test_an_engine_that_cannot_come_back_is_built_anew(manager: GPUResourceManager, workshop: Workshop) -> None:
    use(manager)
    workshop.resident.fail_next["restore"] = OSError("the mirror is gone")
    with pytest.raises(OSError, match="the mirror is gone"):
        use(manager)
    assert tts(manager)["state"] == "cpu"
    use(manager)
    assert workshop.loads == 2
    assert workshop.engines[0].resident.place == "nowhere"


def test_a_device_that_is_lost_while_a_model_leaves_it_breaks_the_engine(
    manager: GPUResourceManager, clock: ManualClock, workshop: Workshop, device: SimulatedDevice
) -> None:
    with manager.lease("tts") as engine:
        engine.resident.fail_next["offload"] = RuntimeError("CUDA error: unspecified launch failure")
        device.failure = "unspecified launch failure"
    clock.advance(RETRY_AFTER_S)
    assert comes_to(manager, clock, State.RELEASED)
    device.failure = None
    use(manager)
    assert workshop.loads == 2


@pytest.mark.parametrize(
    "words",
    ["CUDA error: invalid device ordinal", "CUDA error: invalid argument",
     "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"],
)  # fmt: skip
@pytest.mark.parametrize("where", ["request", "offload", "restore"])
def test_a_mistake_that_leaves_the_device_usable_costs_no_engine(
    words: str, where: str, manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    other = Workshop()
    manager.register("asr", other.load, keep_warm=-1)
    use(manager, "asr")
    with suppress(RuntimeError), manager.lease("tts") as engine:
        if where == "request":
            raise RuntimeError(words)
        engine.resident.fail_next[where] = RuntimeError(words)
    if where == "restore":
        with suppress(RuntimeError):
            use(manager)
    clock.advance(RETRY_AFTER_S)
    assert comes_to(manager, clock, State.HOST)
    use(manager, "asr")
    assert other.loads == 1
    assert where == "restore" or (use(manager) is engine and workshop.loads == 1)


@pytest.mark.parametrize("verb", ["load", "restore", "offload"])
def test_a_move_waits_for_the_end_of_a_capture_that_is_in_its_way(
    verb: str, manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    def request() -> None:
        with manager.lease("tts") as engine:
            if verb == "offload":
                engine.resident.fail_next["offload"] = CaptureUnderWay("a card")

    if verb == "load":
        workshop.fail_next = RuntimeError("CUDA error: operation not permitted when stream is capturing")
    else:
        use(manager)
        workshop.resident.fail_next["restore"] = CaptureUnderWay("a card")
    after(clock, 0.1, Worker(request))
    assert (tts(manager)["state"], tts(manager)["last_error"]) == ("cpu", None)
    assert len(workshop.engines) == 1


def test_a_capture_without_end_keeps_nobody_waiting_for_ever_and_costs_no_engine(
    manager: GPUResourceManager, clock: ManualClock, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(manager)

    def restore() -> int:
        clock.advance(CAPTURE_WITHIN_S / 2)
        raise CaptureUnderWay("a card")

    with monkeypatch.context() as patched:
        patched.setattr(workshop.resident, "restore", restore)
        with pytest.raises(CaptureUnderWay):
            after(clock, 0, Worker(use, manager))
    assert tts(manager)["state"] == "cpu"
    use(manager)
    assert workshop.loads == 1


def test_the_device_is_asked_outside_the_lock(
    manager: GPUResourceManager, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take seconds, and nobody could look at the status meanwhile."""
    held: list[bool] = []

    def is_usable() -> bool:
        held.append(owned_by_this_thread(manager._dispatcher.lock))
        return True

    monkeypatch.setattr(device, "is_usable", is_usable)
    with suppress(RuntimeError), manager.lease("tts") as engine:
        engine.resident.fail_next["offload"] = RuntimeError("CUDA error: invalid argument")
        raise RuntimeError("CUDA error: invalid argument")
    assert held == [False, False]


def test_a_device_that_answers_nothing_more_is_remembered_whatever_fails_later(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    assert manager.device_lost is None
    loss = DeviceLost("CUDA error: unspecified launch failure")
    for error in (loss, DeviceLost("the same again"), OSError("no weights")):
        workshop.fail_next = error
        with pytest.raises(type(error)):
            use(manager)
        assert manager.device_lost is loss


def test_who_waited_keeps_the_error_of_a_load_and_not_what_it_had_made(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    class Half:
        pass

    made: list[weakref.ref[Half]] = []

    def load() -> None:
        half = Half()
        made.append(weakref.ref(half))
        raise OSError("the other half is missing")

    manager.register("half", load)
    with pytest.raises(OSError, match="other half") as caught:
        use(manager, "half")
    assert caught.value.__traceback__
    assert made[0]() is None


def test_moves_leave_no_thread_behind(manager: GPUResourceManager) -> None:
    for _ in range(3):
        use(manager)
    manager.release()
    manager._moves.join()
    assert not manager._moves._threads


def test_an_offload_that_fails_when_the_bytes_have_left_leaves_the_model_where_they_are(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    with manager.lease("tts") as engine:
        resident = engine.resident

        def offload() -> int:
            resident.place = "host"
            raise OSError("the caches could not be emptied")

        resident.offload = offload
    assert (tts(manager)["state"], tts(manager)["device_bytes"], tts(manager)["host_bytes"]) == ("cpu", 0, 100)
    assert tts(manager)["last_error"] == "OSError: the caches could not be emptied"
    assert use(manager) is engine


@pytest.mark.parametrize(("act", "state"), [("offload", State.HOST), ("release", State.RELEASED)])
def test_what_is_asked_of_a_model_on_its_way_follows_its_arrival_and_nobody_waits(
    manager: GPUResourceManager, workshop: Workshop, act: str, state: State
) -> None:
    gate = workshop.gate = Gate()
    manager.warm("tts")
    gate.wait_for_arrival()
    assert getattr(manager, act)("tts") is False
    assert tts(manager)["pending"] == act
    gate.open()
    assert manager.wait_for("tts", state, 10)
    assert tts(manager)["pending"] is None


def test_where_all_is_one_memory_an_offload_has_happened_and_a_release_follows_the_request(workshop: Workshop) -> None:
    with GPUResourceManager(CpuDevice(), adopt=workshop.adopt) as manager:
        manager.register("tts", workshop.load)
        with manager.lease("tts"):
            assert manager.offload("tts") is True
            assert tts(manager)["pending"] is None
            assert manager.release("tts") is False
            assert tts(manager)["pending"] == "release"
        assert tts(manager)["state"] == "released"


def test_who_waits_for_room_that_will_never_be_tries_once_more(warm_manager: GPUResourceManager) -> None:
    errors: list[Exception] = [DeviceOutOfMemory(100, 40, "a card")]

    def load() -> object:
        if errors:
            raise errors.pop()
        return Workshop().load()

    warm_manager.register("asr", load)
    holder = Client(warm_manager).comes_in()
    waiting = Client(warm_manager, "asr").queues()
    managed = warm_manager._managed_models["asr"]
    assert await_that(warm_manager, managed, lambda: managed.memory.waiting_for_room)
    warm_manager.configure("tts", keep_warm=-1)
    waiting.comes_in()
    assert tts(warm_manager)["state"] == "gpu"
    for client in (waiting, holder):
        client.leaves()
