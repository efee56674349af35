"""By hand, at run time: closing with a grace, other settings, broken engines, and what the status says meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fakes import Client, Gate, Worker, Workshop, after, await_that, comes_to

from gpu_manager import (
    Event,
    GPUResourceManager,
    ManagerClosed,
    RequestCancelled,
    RequestTimeout,
    SimulatedDevice,
    State,
    UnknownModel,
)
from residency.clock import ManualClock
from residency.errors import InvalidInput
from residency.progress import current
from residency.scheduling.dispatcher import WARM_GRACE_S
from residency.scheduling.mover import STUCK_AFTER_S

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


# -- the end, with a grace --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grace", [0, 5, "1m"])
def test_close_leaves_alone_what_still_runs_after_its_grace_and_refuses_who_waits_at_once(
    grace: float | str, manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    manager.register("asr", Workshop().load)
    use(manager, "asr")
    running, waiting = Client(manager).comes_in(), Client(manager).queues()
    closing = Worker(manager.close, grace)
    with pytest.raises(ManagerClosed):
        waiting.worker.result()
    assert closing.is_alive() or grace == 0
    assert after(clock, {0: 0, 5: 5, "1m": 60}[grace], closing) is False
    assert manager.closed
    assert workshop.resident.place == "device"
    assert manager.status()["models"]["asr"]["state"] == "released"
    running.leaves()
    assert workshop.resident.place == "nowhere"
    assert manager.close(0) is True


def test_close_waits_for_a_request_that_ends_within_its_grace(manager: GPUResourceManager, clock: ManualClock) -> None:
    running = Client(manager).comes_in()
    closing = Worker(manager.close, 5)
    while not manager.closed:
        closing.join(0.01)
    clock.advance(4.9)
    running.leaves()
    assert closing.result() is True
    assert tts(manager)["state"] == "released"


def test_close_leaves_a_load_alone_that_takes_too_long(
    manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    gate = workshop.gate = Gate()
    client = Client(manager).queues()
    gate.wait_for_arrival()
    assert manager.close(0) is False
    with pytest.raises(ManagerClosed):
        client.worker.result()
    gate.open()
    assert comes_to(manager, clock, State.RELEASED)
    assert manager.close(0) is True
    assert workshop.resident.place == "nowhere"


def test_the_grace_is_not_for_what_is_leaving(manager: GPUResourceManager, workshop: Workshop) -> None:
    client = Client(manager).comes_in()
    gate = workshop.resident.gates["offload"] = Gate()
    leaving = Worker(client.leaves)
    gate.wait_for_arrival()
    closing = Worker(manager.close, 0)
    closing.join(0.05)
    assert closing.is_alive()
    gate.open()
    assert closing.result() is True
    leaving.result()
    assert workshop.resident.place == "nowhere"


@pytest.mark.parametrize("goes_on", ["with bytes", "without", ""])
def test_what_hangs_as_it_leaves_is_left_alone_at_the_end(
    goes_on: str, manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    client = Client(manager).comes_in()
    gate = workshop.resident.gates["offload"] = Gate()
    leaving = Worker(client.leaves)
    gate.wait_for_arrival()
    closing = Worker(manager.close, 0)
    for _ in range(3):
        if goes_on:
            progress = client.managed.move_task.progress
            progress.advance(1) if goes_on == "with bytes" else progress.beat()
        clock.advance(STUCK_AFTER_S)
        closing.join(0.05)
    assert closing.is_alive() is bool(goes_on)
    if not goes_on:
        assert closing.result() is False
    gate.open()
    leaving.result()
    assert closing.result() is bool(goes_on)
    assert manager.close() is True
    assert workshop.resident.place == "nowhere"


@pytest.mark.parametrize("end", ["close", "unregister"])
def test_who_waits_for_a_state_hears_that_it_will_not_come(end: str, manager: GPUResourceManager) -> None:
    managed = manager._managed_models["tts"]
    watching = Worker(manager.wait_for, "tts", State.DEVICE)
    assert await_that(manager, managed, lambda: len(managed.watchers) == 1)
    manager.close() if end == "close" else manager.unregister("tts")
    assert watching.result() is False


@pytest.mark.parametrize("when", ["before it fails", "afterwards"])
def test_who_waits_for_a_model_whose_load_fails_hears_of_it(
    when: str, manager: GPUResourceManager, workshop: Workshop
) -> None:
    workshop.fail_next = FileNotFoundError("no weights")
    gate, managed = Gate(), manager._managed_models["tts"]
    workshop.gate = gate
    manager.warm("tts")
    if when == "afterwards":
        gate.open()
        assert await_that(manager, managed, lambda: managed.faults.last_error is not None)
    waiting = Worker(manager.wait_for, "tts", State.DEVICE)
    if when == "before it fails":
        assert await_that(manager, managed, lambda: bool(managed.watchers))
        gate.open()
    assert waiting.result() is False
    assert manager.status()["models"]["tts"]["last_error"] == "FileNotFoundError: no weights"
    manager.warm("tts")
    assert manager.wait_for("tts", State.DEVICE) is True


def test_who_watches_in_vain_leaves_nothing_behind(manager: GPUResourceManager) -> None:
    assert manager.wait_for("tts", State.DEVICE, 0.001) is False
    assert not manager._managed_models["tts"].watchers


def test_who_has_a_lease_cannot_close(manager: GPUResourceManager) -> None:
    with manager.lease("tts"), pytest.raises(RuntimeError, match=r"^close\(\) would wait"):
        manager.close()
    assert not manager.closed


@pytest.mark.parametrize("grace", [-2, "soon"])
def test_what_is_no_grace_closes_nothing(grace: object, manager: GPUResourceManager) -> None:
    with pytest.raises(InvalidInput):
        manager.close(grace)
    assert use(manager)


def test_unregister_refuses_who_waits_and_lets_the_running_request_end(manager: GPUResourceManager) -> None:
    manager.register("asr", Workshop().load)
    running, waiting = Client(manager).comes_in(), Client(manager).queues()
    unregistering = Worker(manager.unregister, "tts")
    with pytest.raises(UnknownModel, match="known: asr") as caught:
        waiting.worker.result()
    assert (caught.value.name, caught.value.known) == ("tts", ("asr",))
    with pytest.raises(UnknownModel):
        use(manager)
    running.leaves()
    unregistering.result()
    assert manager.names() == ("asr",)
    with manager.lease("asr"), pytest.raises(RuntimeError, match=r"^unregister\(\) would"):
        manager.unregister("asr")
    manager.register("tts", Workshop().load)
    manager.unregister("tts")
    assert manager.names() == ("asr",)


# -- other settings at run time ---------------------------------------------------------------------------------


def test_a_shorter_keep_warm_counts_for_the_idle_time_that_has_begun(
    warm_manager: GPUResourceManager, clock: ManualClock
) -> None:
    use(warm_manager)
    clock.advance(100)
    warm_manager.configure("tts", keep_warm="3m")
    assert tts(warm_manager)["next"] == {"to": "cpu", "in_s": 80}
    clock.advance(79)
    assert tts(warm_manager)["state"] == "gpu"
    clock.advance(1)
    assert comes_to(warm_manager, clock, State.HOST)
    warm_manager.configure("tts", idle_timeout=180)
    assert comes_to(warm_manager, clock, State.RELEASED)


def test_a_keep_warm_that_has_run_out_already_takes_effect_at_once(
    warm_manager: GPUResourceManager, clock: ManualClock
) -> None:
    use(warm_manager)
    clock.advance(100)
    warm_manager.configure("tts", keep_warm=100)
    assert warm_manager.wait_for("tts", State.HOST, 10)
    warm_manager.configure("tts", keep_warm=1000)
    assert tts(warm_manager)["state"] == "cpu", "it is brought by requests only"


def test_to_auto_and_back(warm_manager: GPUResourceManager) -> None:
    use(warm_manager)
    warm_manager.configure("tts", keep_warm="auto")
    assert (tts(warm_manager)["policy"], tts(warm_manager)["keep_warm_s"]) == ("auto", 0)
    assert warm_manager.wait_for("tts", State.HOST, 10)
    warm_manager.configure("tts", keep_warm=30, idle_timeout="1h")
    assert (tts(warm_manager)["policy"], tts(warm_manager)["keep_warm_s"]) == ("fixed", 30)
    assert tts(warm_manager)["idle_timeout_s"] == 3600
    warm_manager.configure("tts")
    assert (tts(warm_manager)["keep_warm_s"], tts(warm_manager)["idle_timeout_s"]) == (30, 3600)


def test_all_models_are_configured_when_none_is_named(warm_manager: GPUResourceManager) -> None:
    warm_manager.register("asr", Workshop().load)
    use(warm_manager)
    use(warm_manager, "asr")
    warm_manager.configure(keep_warm=0)
    for name in ("tts", "asr"):
        assert warm_manager.wait_for(name, State.HOST, 10)


def test_no_setting_is_changed_by_what_is_none(warm_manager: GPUResourceManager) -> None:
    for settings in ({"keep_warm": "soon"}, {"idle_timeout": -5}):
        with pytest.raises(InvalidInput):
            warm_manager.configure("tts", **settings)
    with pytest.raises(UnknownModel):
        warm_manager.configure("llm", keep_warm=0)
    assert (tts(warm_manager)["keep_warm_s"], tts(warm_manager)["idle_timeout_s"]) == (3600, -1)
    warm_manager.close()
    with pytest.raises(ManagerClosed):
        warm_manager.configure("tts", keep_warm=0)


# -- the status -------------------------------------------------------------------------------------------------


def test_the_status_says_what_comes_next_and_when(manager: GPUResourceManager, clock: ManualClock) -> None:
    assert tts(manager)["next"] is None
    manager.configure("tts", keep_warm=10, idle_timeout=60)
    with manager.lease("tts"):
        assert (tts(manager)["next"], tts(manager)["idle_s"], tts(manager)["policy"]) == (None, 0.0, "fixed")
    clock.advance(4)
    assert (tts(manager)["next"], tts(manager)["idle_s"]) == ({"to": "cpu", "in_s": 6}, 4)
    clock.advance(6)
    assert comes_to(manager, clock, State.HOST)
    assert tts(manager)["next"] == {"to": "released", "in_s": 50}
    clock.advance(50)
    assert comes_to(manager, clock, State.RELEASED)
    assert tts(manager)["next"] is None


def test_the_status_says_how_far_a_load_is(manager: GPUResourceManager, clock: ManualClock, workshop: Workshop) -> None:
    at_start, half_way = Gate(), Gate()

    def load() -> object:
        at_start.pass_through()
        current().enter("reading", 400)
        current().advance(100)
        half_way.pass_through()
        return workshop.load()

    manager.register("asr", load)
    clients = [Client(manager, "asr").queues() for _ in range(2)]
    at_start.wait_for_arrival()
    told = {"to": "gpu", "phase": "building", "bytes": 0, "total_bytes": None, "seconds": 0, "bytes_per_s": None}
    asr = manager.status()["models"]["asr"]
    assert (asr["progress"], asr["state"], asr["waiting"], asr["next"]) == (told, "moving", 2, None)
    at_start.open()
    half_way.wait_for_arrival()
    clock.advance(2)
    told |= {"phase": "reading", "bytes": 100, "total_bytes": 400, "seconds": 2, "bytes_per_s": 50}
    assert manager.status()["models"]["asr"]["progress"] == told
    half_way.open()
    for client in clients:
        client.comes_in()
        assert manager.status()["models"]["asr"]["progress"] is None
        client.leaves()
    assert manager.status()["models"]["asr"]["last_move"] == {"from": "gpu", "to": "cpu", "bytes": 100, "seconds": 0}


def test_events_tell_every_move_in_order(manager: GPUResourceManager, clock: ManualClock, workshop: Workshop) -> None:
    told: list[Event] = []
    unsubscribe = manager.subscribe(told.append)
    workshop.fail_next = OSError("no weights")
    with pytest.raises(OSError, match="no weights"):
        use(manager)
    gate = workshop.gate = Gate()
    client = Client(manager).queues()
    gate.wait_for_arrival()
    clock.advance(3)
    gate.open()
    client.comes_in().leaves()
    manager.close()
    assert [(event.what, event.source, event.target) for event in told if event.what not in ("progress", "queue")] == [
        ("began", "released", "gpu"), ("failed", "released", "gpu"), ("began", "released", "gpu"),
        ("done", "released", "gpu"), ("began", "gpu", "cpu"), ("done", "gpu", "cpu"), ("began", "cpu", "released"),
        ("done", "cpu", "released"),
    ]  # fmt: skip
    ends = [event for event in told if event.what in ("done", "failed")]
    assert [event.error for event in ends] == ["OSError: no weights", None, None, None]
    assert [event.seconds for event in ends] == [0, 3, 0, 0]
    assert [event.time_s for event in ends] == [1000, 1003, 1003, 1003]
    assert {event.model for event in told} == {"tts"}
    unsubscribe()


def test_events_tell_who_comes_into_the_queue_and_who_leaves_it(
    manager: GPUResourceManager, clock: ManualClock
) -> None:
    told: list[Event] = []
    manager.subscribe(told.append)
    running = Client(manager).comes_in()
    second, third, impatient = Client(manager).queues(), Client(manager).queues(), Client(manager, timeout=5).queues()
    assert third.lease.cancel() is True
    with pytest.raises(RequestCancelled):
        third.worker.result()
    with pytest.raises(RequestTimeout):
        after(clock, 5, impatient.worker)
    running.leaves()
    second.comes_in().leaves()
    manager.close()
    queue = [event.waiting for event in told if event.what == "queue" and event.source == "gpu"]
    # The first may have waited for the model, and so may have left the queue as that came.
    assert queue[queue[0] == 0 :] == [1, 2, 3, 2, 1, 0]


@pytest.mark.parametrize("verb", ["unregister", "close"])
def test_events_tell_that_nobody_waits_any_more_at_the_end(manager: GPUResourceManager, verb: str) -> None:
    told: list[Event] = []
    manager.subscribe(told.append)
    running = Client(manager).comes_in()
    for waiting in [Client(manager).queues() for _ in range(2)]:
        del waiting
    ending = Worker(*((manager.unregister, "tts") if verb == "unregister" else (manager.close,)))
    running.leaves()
    ending.result()
    manager.close()
    assert [event.waiting for event in told if event.what == "queue"][-1] == 0


def test_what_is_sent_away_by_hand_has_no_grace_of_its_warming_left(
    manager: GPUResourceManager, clock: ManualClock
) -> None:
    manager.configure("tts", idle_timeout=30)
    manager.warm("tts")
    assert manager.wait_for("tts", State.DEVICE, 10)
    assert manager.offload("tts") is True
    clock.advance(29)
    assert tts(manager)["state"] == "cpu"
    clock.advance(2)
    assert comes_to(manager, clock, State.RELEASED)


@pytest.mark.parametrize("before", ["release", "offload", None])
def test_a_model_that_is_warmed_during_a_request_stays_after_it(
    before: str | None, manager: GPUResourceManager, clock: ManualClock
) -> None:
    with manager.lease("tts"):
        if before:
            assert getattr(manager, before)("tts") is False
        assert manager.warm("tts") is True
        assert tts(manager)["pending"] is None
    assert tts(manager)["state"] == "gpu"
    clock.advance(WARM_GRACE_S - 1)
    assert tts(manager)["state"] == "gpu"
    clock.advance(1)
    assert comes_to(manager, clock, State.HOST)


def test_a_model_that_is_warmed_while_it_arrives_for_a_request_stays_after_it(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    workshop.gate = gate = Gate()
    client = Client(manager)
    gate.wait_for_arrival()
    assert manager.release("tts") is False
    assert manager.warm("tts") is False
    gate.open()
    client.comes_in().leaves()
    assert tts(manager)["state"] == "gpu"


def test_a_model_that_is_warmed_for_a_request_leaves_with_its_end(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    workshop.gate = gate = Gate()
    manager.warm("tts")
    gate.wait_for_arrival()
    client = Client(manager).queues()
    gate.open()
    client.comes_in().leaves()
    assert tts(manager)["state"] == "cpu"


def test_a_model_that_is_warmed_stays_after_all_requests_that_wait(manager: GPUResourceManager) -> None:
    first = Client(manager).comes_in()
    second = Client(manager).queues()
    manager.warm("tts")
    first.leaves()
    second.comes_in().leaves()
    assert tts(manager)["state"] == "gpu"


def test_a_model_that_breaks_in_the_request_during_which_it_was_warmed_is_loaded_again(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    lease = manager.lease("tts")
    with lease as engine:
        manager.warm("tts")
        lease.discard()
    managed = manager._managed_models["tts"]
    assert await_that(manager, managed, lambda: managed.state is State.DEVICE and managed.engine is not engine)


@pytest.mark.parametrize("after", ["release", "offload"])
def test_what_is_asked_after_a_warming_happens(after: str, manager: GPUResourceManager) -> None:
    with manager.lease("tts"):
        manager.warm("tts")
        assert getattr(manager, after)("tts") is False
    assert manager.wait_for("tts", State.HOST if after == "offload" else State.RELEASED, 10)
