"""Receipts: how long each request waited for its model, and why."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fakes import Client, Gate, Worker, Workshop, await_that, comes_to

from gpu_manager import GPUResourceManager, Lease, RequestCancelled, SimulatedDevice, State
from residency.clock import ManualClock
from residency.receipts import Receipt

pytestmark = pytest.mark.usefixtures("unmeasured")

READY = Receipt(0.0, 0.0, None, 0.0)


def use(manager: GPUResourceManager, name: str = "tts") -> Lease:
    lease = manager.lease(name)
    with lease:
        pass
    return lease


def last_wait(manager: GPUResourceManager, name: str = "tts") -> Any:
    return manager.status()["models"][name]["last_wait"]


def test_before_it_is_entered_there_is_none_and_afterwards_it_stays(manager: GPUResourceManager) -> None:
    lease = manager.lease("tts")
    assert lease.receipt is None
    assert last_wait(manager) is None
    with lease:
        assert lease.receipt == Receipt(0.0, 0.0, "load", 0.0)
    assert lease.receipt == Receipt(0.0, 0.0, "load", 0.0)
    assert last_wait(manager) == {"waited_s": 0.0, "queue_s": 0.0, "move": "load", "move_s": 0.0}


def test_a_model_that_is_there_was_ready(manager: GPUResourceManager) -> None:
    manager.configure("tts", keep_warm=-1)
    use(manager)
    assert use(manager).receipt == READY


def test_a_load_is_counted_from_the_arrival_of_each_request(
    manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    workshop.gate = gate = Gate()
    manager.warm("tts")
    gate.wait_for_arrival()
    clock.advance(10)  # nobody waits yet
    first = Client(manager).queues()
    clock.advance(2)
    second = Client(manager).queues()
    clock.advance(1)
    gate.open()
    first.comes_in()
    assert first.lease.receipt == Receipt(3.0, 0.0, "load", 3.0)
    clock.advance(5)
    first.leaves()
    second.comes_in()
    assert second.lease.receipt == Receipt(6.0, 5.0, "load", 1.0)
    second.leaves()
    assert last_wait(manager) == {"waited_s": 6.0, "queue_s": 5.0, "move": "load", "move_s": 1.0}


def test_a_wait_for_another_request_alone_has_no_move(manager: GPUResourceManager, clock: ManualClock) -> None:
    first = Client(manager).comes_in()
    second = Client(manager).queues()
    clock.advance(4)
    first.leaves()
    second.comes_in()
    assert second.lease.receipt == Receipt(4.0, 4.0, None, 0.0)
    second.leaves()


def test_a_model_that_was_just_leaving_has_to_leave_first(
    manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    manager.configure("tts", keep_warm=10)
    use(manager)
    leaving, coming = Gate(), Gate()
    workshop.resident.gates.update(offload=leaving, restore=coming)
    clock.advance(10)
    leaving.wait_for_arrival()
    client = Client(manager).queues()
    clock.advance(0.5)
    leaving.open()
    coming.wait_for_arrival()
    clock.advance(1.5)
    coming.open()
    client.comes_in()
    assert client.lease.receipt == Receipt(2.0, 0.5, "restore", 1.5)
    client.leaves()


def test_the_wait_for_room_is_part_of_the_queue(clock: ManualClock) -> None:
    models = {name: Workshop() for name in ("tts", "asr")}
    with GPUResourceManager(SimulatedDevice(1 << 30), clock=clock, adopt=Workshop.adopt, budget_bytes=150) as manager:
        for name, workshop in models.items():
            manager.register(name, workshop.load, size_bytes=100)
        holder = Client(manager, "asr").comes_in()
        models["tts"].gate = gate = Gate()
        client = Client(manager).queues()
        clock.advance(7)
        holder.leaves()
        gate.wait_for_arrival()
        clock.advance(2)
        gate.open()
        client.comes_in()
        assert client.lease.receipt == Receipt(9.0, 7.0, "load", 2.0)
        client.leaves()
        assert last_wait(manager, "asr") == {"waited_s": 0.0, "queue_s": 0.0, "move": "load", "move_s": 0.0}


def test_an_attempt_that_had_to_wait_for_room_is_part_of_the_queue(clock: ManualClock) -> None:
    """The device, which others use as well, was full: the move begins again once a model has left."""
    models = {name: Workshop() for name in ("tts", "asr")}
    device = SimulatedDevice(1 << 30)
    with GPUResourceManager(device, clock=clock, adopt=Workshop.adopt) as manager:
        for name, workshop in models.items():
            manager.register(name, workshop.load)
        use(manager)
        holder = Client(manager, "asr").comes_in()
        resident = models["tts"].resident
        resident.fail_next["restore"] = device.full(100, 0)
        resident.gates["restore"] = attempt = Gate()
        client = Client(manager).queues()
        attempt.wait_for_arrival()
        clock.advance(1)
        resident.gates["restore"] = again = Gate()
        attempt.open()
        managed = manager._managed_models["tts"]
        assert await_that(manager, managed, lambda: managed.memory.waiting_for_room)
        clock.advance(4)
        holder.leaves()
        again.wait_for_arrival()
        clock.advance(2)
        again.open()
        client.comes_in()
        assert client.lease.receipt == Receipt(7.0, 5.0, "restore", 2.0)
        client.leaves()


def test_a_lease_that_shares_a_request_has_that_ones(manager: GPUResourceManager, clock: ManualClock) -> None:
    first = Client(manager).comes_in()
    second = manager.lease("tts")
    inner = manager.lease("tts")
    reader = manager.lease("tts", reading=True)

    def request() -> None:
        with second:
            clock.advance(100)
            with inner:
                pass

    worker = Worker(request)
    managed = manager._managed_models["tts"]
    assert await_that(manager, managed, lambda: second.request in managed.leases.waiting())
    clock.advance(3)
    with reader:
        assert reader.receipt == first.lease.receipt == Receipt(0.0, 0.0, "load", 0.0)
    first.leaves()
    worker.result()
    assert inner.receipt == second.receipt == Receipt(3.0, 3.0, None, 0.0)
    assert last_wait(manager)["waited_s"] == 3


def test_coroutines_get_one_too(manager: GPUResourceManager, clock: ManualClock) -> None:
    async def request() -> Receipt | None:
        lease = manager.lease("tts")
        async with lease:
            return lease.receipt

    assert asyncio.run(request()) == Receipt(0.0, 0.0, "load", 0.0)
    assert comes_to(manager, clock, State.HOST)
    assert asyncio.run(request()) == Receipt(0.0, 0.0, "restore", 0.0)


def test_a_request_that_never_got_the_model_has_none(manager: GPUResourceManager, workshop: Workshop) -> None:
    workshop.fail_next = OSError("no weights")
    lease = manager.lease("tts")
    with pytest.raises(OSError, match="no weights"):
        lease.__enter__()
    assert lease.receipt is None
    client = Client(manager).comes_in()
    waiting = Client(manager).queues()
    waiting.lease.cancel()
    with pytest.raises(RequestCancelled):
        waiting.worker.result()
    assert waiting.lease.receipt is None
    client.leaves()
