"""Requests that wait: for how long, in which order, and how they end without the model."""

from __future__ import annotations

import math

import pytest
from fakes import Client, Gate, Worker, Workshop, after, await_that, comes_to

from gpu_manager import (
    GPUResourceManager,
    ModelBusy,
    RequestCancelled,
    RequestTimeout,
    SimulatedDevice,
    State,
)
from residency.clock import ManualClock
from residency.errors import InvalidInput
from residency.scheduling.mover import STUCK_AFTER_S

pytestmark = pytest.mark.usefixtures("unmeasured")


def tts(manager: GPUResourceManager) -> dict:
    return manager.status()["models"]["tts"]


def use(manager: GPUResourceManager, name: str = "tts", timeout: float | None = None) -> object:
    with manager.lease(name, timeout) as engine:
        return engine


# -- timeouts ---------------------------------------------------------------------------------------------------


def test_a_request_that_times_out_leaves_the_load_to_arrive(
    manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    gate = workshop.gate = Gate()
    client = Client(manager, timeout=5).queues()
    gate.wait_for_arrival()
    clock.advance(4.9)
    assert tts(manager)["waiting"] == 1
    with pytest.raises(RequestTimeout, match="5 s") as caught:
        after(clock, 0.1, client.worker)
    error = caught.value
    assert (error.name, error.place, error.doing) == ("tts", 1, "loading")
    assert error.waited_s == pytest.approx(5)
    assert (tts(manager)["state"], tts(manager)["waiting"]) == ("moving", 0)
    gate.open()
    assert comes_to(manager, clock, State.HOST), "it leaves the device as after any request"
    assert workshop.resident.log == ["offload"]
    assert use(manager) is workshop.engines[0]
    assert workshop.loads == 1


def test_a_request_behind_others_times_out_alone(manager: GPUResourceManager, clock: ManualClock) -> None:
    holder = Client(manager).comes_in()
    first = Client(manager).queues()
    hasty = Client(manager, timeout=3).queues()
    last = Client(manager, timeout=30).queues()
    with pytest.raises(RequestTimeout) as caught:
        after(clock, 3, hasty.worker)
    assert (caught.value.waited_s, caught.value.place, caught.value.doing) == (3, 2, "device")
    assert [client.lease.place for client in (holder, first, hasty, last)] == [0, 1, None, 2]
    for client in (holder, first, last):
        client.comes_in().leaves()


@pytest.mark.parametrize("end", ["timeout", "cancel"])
def test_who_gives_up_does_not_wait_for_a_model_that_is_leaving(
    end: str, manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    first = Client(manager).comes_in()
    gate = workshop.resident.gates["offload"] = Gate()
    leaving = Worker(first.leaves)
    gate.wait_for_arrival()
    second = Client(manager, timeout=5).queues()
    if end == "timeout":
        with pytest.raises(RequestTimeout):
            after(clock, 5, second.worker)
    else:
        second.lease.cancel()
        with pytest.raises(RequestCancelled):
            second.worker.result()
    assert manager.status()["models"]["tts"]["state"] == "moving"
    gate.open()
    leaving.result()


def test_an_answer_does_not_wait_until_a_large_model_has_left(device: SimulatedDevice) -> None:
    workshop = Workshop(1 << 30)
    with GPUResourceManager(device, adopt=workshop.adopt) as manager:
        manager.register("tts", workshop.load)
        for _ in range(2):  # the first one copies all weights
            client = Client(manager).comes_in()
            gate = workshop.resident.gates["offload"] = Gate()
            assert client.leaves() is workshop.engines[0]
            gate.wait_for_arrival()
            assert manager.status()["models"]["tts"]["state"] == "moving"
            offload = Worker(manager.offload, "tts")
            gate.open()
            assert offload.result() is True
            assert manager.status()["models"]["tts"]["state"] == "cpu"


def test_a_small_model_has_left_when_the_block_ends(manager: GPUResourceManager) -> None:
    with manager.lease("tts"):
        pass
    assert manager.status()["models"]["tts"]["state"] == "cpu"


def test_an_answer_is_not_lost_to_a_model_that_hangs_as_it_leaves(
    manager: GPUResourceManager, clock: ManualClock, workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    manager.configure("tts", idle_timeout=-1)
    client = Client(manager).comes_in()
    gate = workshop.resident.gates["offload"] = Gate()
    leaving = Worker(client.leaves)
    gate.wait_for_arrival()
    while leaving.is_alive() or "tts: hangs on its way off the device" not in caplog.text:
        clock.advance(STUCK_AFTER_S)  # it may just have been about to look at the clock
        leaving.join(0.01)
    assert leaving.result() is workshop.engines[0]
    gate.open()
    assert comes_to(manager, clock, State.HOST)


def test_requests_that_gave_up_are_not_remembered_while_the_model_is_held(
    manager: GPUResourceManager, clock: ManualClock
) -> None:
    holder = Client(manager).comes_in()
    for _ in range(3):
        with pytest.raises(RequestTimeout):
            after(clock, 1, Client(manager, timeout=1).queues().worker)
    assert len(holder.managed.leases.requests) <= 1, "the holder itself may be in it"
    holder.leaves()


def test_a_timeout_that_is_a_text_is_a_duration(manager: GPUResourceManager, clock: ManualClock) -> None:
    with manager.lease("tts"):
        worker = Worker(use, manager, "tts", "1m")
        managed = manager._managed_models["tts"]
        assert await_that(manager, managed, lambda: any(request.event for request in managed.leases.waiting()))
        with pytest.raises(RequestTimeout, match="60 s"):
            after(clock, 60, worker)


@pytest.mark.parametrize("timeout", [None, -1, "-1", math.inf])
def test_without_a_timeout_it_takes_as_long_as_it_takes(
    timeout: float | None, manager: GPUResourceManager, clock: ManualClock
) -> None:
    holder = Client(manager).comes_in()
    waiting = Client(manager, timeout=timeout).queues()
    clock.advance(1e9)
    holder.leaves()
    assert waiting.comes_in().leaves()


def test_a_timeout_is_of_real_seconds_on_the_systems_clock(workshop: Workshop, device: SimulatedDevice) -> None:
    with GPUResourceManager(device, adopt=workshop.adopt) as manager:
        manager.register("tts", workshop.load)
        holder = Client(manager).comes_in()
        with pytest.raises(RequestTimeout) as caught:
            Worker(use, manager, "tts", 0.02).result()
        assert 0.02 <= caught.value.waited_s < 5
        holder.leaves()
        assert manager.wait_for("tts", State.HOST)
        assert manager.wait_for("tts", State.DEVICE, 0.01) is False


def test_a_timeout_of_0_takes_only_what_is_there_and_free(
    manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    with pytest.raises(ModelBusy) as caught:
        use(manager, timeout=0)
    assert (caught.value.name, caught.value.waiting, caught.value.doing) == ("tts", 0, "released")
    assert workshop.loads == 0
    manager.configure(keep_warm=60)
    engine = use(manager)
    assert use(manager, timeout=0) is engine
    holder = Client(manager).comes_in()
    waiting = Client(manager).queues()
    with pytest.raises(ModelBusy) as caught:
        use(manager, timeout=0)
    assert (caught.value.waiting, caught.value.doing) == (1, "device")
    assert tts(manager)["waiting"] == 1, "it left no trace"
    holder.leaves()
    waiting.comes_in().leaves()


def test_a_timeout_of_0_gets_no_model_that_rests_in_main_memory_or_moves(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    use(manager)
    with pytest.raises(ModelBusy, match="host"):
        use(manager, timeout=0)
    gate = workshop.resident.gates["restore"] = Gate()
    client = Client(manager).queues()
    gate.wait_for_arrival()
    with pytest.raises(ModelBusy, match="restoring"):
        use(manager, timeout=0)
    gate.open()
    client.comes_in().leaves()


def test_a_timeout_of_0_shares_a_lease_of_ones_own(manager: GPUResourceManager) -> None:
    with manager.lease("tts") as outer, manager.lease("tts", timeout=0) as inner:
        assert inner is outer


@pytest.mark.parametrize("timeout", [-2, -0.5, "soon", "", math.nan, "1d"])
def test_what_is_no_timeout_is_refused_before_anything_happens(
    timeout: float | str, manager: GPUResourceManager
) -> None:
    with pytest.raises(InvalidInput, match="15m"):
        manager.lease("tts", timeout)


# -- how many may wait ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_no_more_than_allowed_may_wait(allowed: int, manager: GPUResourceManager) -> None:
    manager.register("asr", Workshop().load, max_waiting=allowed)
    clients = [Client(manager, "asr").comes_in()]
    clients += [Client(manager, "asr").queues() for _ in range(allowed)]
    with pytest.raises(ModelBusy) as caught:
        use(manager, "asr")
    assert (caught.value.name, caught.value.waiting, caught.value.doing) == ("asr", allowed, "device")
    for client in clients:
        client.comes_in().leaves()
    assert use(manager, "asr")


def test_the_first_request_is_taken_while_its_load_runs_and_counts_as_waiting(manager: GPUResourceManager) -> None:
    workshop = Workshop()
    manager.register("asr", workshop.load, max_waiting=1)
    gate = workshop.gate = Gate()
    first = Client(manager, "asr").queues()
    gate.wait_for_arrival()
    with pytest.raises(ModelBusy, match="loading; 1 waiting"):
        use(manager, "asr")
    gate.open()
    first.comes_in().leaves()


# -- cancelling and places --------------------------------------------------------------------------------------


def test_a_place_is_none_0_or_how_many_are_before(manager: GPUResourceManager) -> None:
    lease = manager.lease("tts")
    assert lease.place is None
    with lease:
        assert lease.place == 0
        waiting = [Client(manager).queues() for _ in range(3)]
        assert [client.lease.place for client in waiting] == [1, 2, 3]
    assert lease.place is None
    for client in waiting:
        client.comes_in()
        assert client.lease.place == 0
        client.leaves()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_of_those_who_wait_is_cancelled_and_the_others_keep_their_order(
    which: int, manager: GPUResourceManager
) -> None:
    holder = Client(manager).comes_in()
    waiting = [Client(manager).queues() for _ in range(3)]
    cancelled = waiting.pop(which)
    assert cancelled.lease.cancel() is True
    assert cancelled.lease.cancelled
    with pytest.raises(RequestCancelled) as caught:
        cancelled.worker.result()
    assert caught.value.name == "tts"
    assert cancelled.lease.cancel() is False
    assert cancelled.lease.place is None
    assert [client.lease.place for client in waiting] == [1, 2]
    holder.leaves()
    first, second = waiting
    first.comes_in()
    assert second.lease.place == 1
    first.leaves()
    second.comes_in().leaves()


def test_cancelling_before_entering_refuses_at_once(manager: GPUResourceManager, workshop: Workshop) -> None:
    lease = manager.lease("tts")
    assert not lease.cancelled
    assert lease.cancel() is True
    with pytest.raises(RequestCancelled, match="'tts'"), lease:
        pass
    assert workshop.loads == 0
    assert lease.cancel() is False
    assert tts(manager)["state"] == "released"


def test_cancelling_a_lease_that_has_the_model_or_has_ended_does_nothing(manager: GPUResourceManager) -> None:
    lease = manager.lease("tts")
    with lease as engine:
        assert lease.cancel() is False
        assert lease.place == 0
        assert tts(manager)["state"] == "gpu"
        assert manager._managed_models["tts"].engine is engine
    assert lease.cancel() is False
    assert use(manager) is engine


def test_a_cancelled_request_leaves_the_load_to_arrive(
    manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    gate = workshop.gate = Gate()
    client = Client(manager).queues()
    gate.wait_for_arrival()
    assert client.lease.cancel()
    with pytest.raises(RequestCancelled):
        client.worker.result()
    gate.open()
    assert comes_to(manager, clock, State.HOST)
    assert tts(manager)["last_error"] is None
