"""Leases that meet: circles that nobody may wait in, and leases that are shared, lost, or a loader's."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest
from app_process import ROOT
from fakes import Client, FakeEngine, Gate, Worker, Workshop, await_that

from gpu_manager import (
    GPUResourceManager,
    LeaseDeadlock,
    ManagerClosed,
    ModelBusy,
    RequestCancelled,
    State,
)
from residency.clock import ManualClock

pytestmark = pytest.mark.usefixtures("unmeasured")


def tts(manager: GPUResourceManager) -> dict:
    return manager.status()["models"]["tts"]


def use(manager: GPUResourceManager, name: str = "tts", timeout: float | None = None) -> object:
    with manager.lease(name, timeout) as engine:
        return engine


# -- waiting in circles -----------------------------------------------------------------------------------------


def chain(manager: GPUResourceManager, has: str, wants: str) -> Worker:
    """Somebody who has one model and waits for another."""
    wanted = manager.lease(wants)

    def request() -> object:
        with manager.lease(has), wanted as engine:
            return engine

    worker = Worker(request)
    managed = manager._managed_models[wants]
    assert await_that(manager, managed, lambda: wanted.request in managed.leases.waiting())
    return worker


@pytest.mark.parametrize("names", ["ab", "abc", "abcd"])
def test_who_would_close_a_circle_is_refused_and_the_others_are_served(names: str, manager: GPUResourceManager) -> None:
    for name in names:
        manager.register(name, Workshop().load)
    with manager.lease(names[-1]):
        workers = [chain(manager, has, wants) for has, wants in reversed(list(pairwise(names)))]
        with pytest.raises(LeaseDeadlock, match=f"holds {names[-1]} and waits for {names[0]!r}") as caught:
            use(manager, names[0])
        assert (caught.value.name, caught.value.holding) == (names[0], (names[-1],))
    for worker in workers:
        assert worker.result()
    assert use(manager, names[0])


def test_waiting_in_a_row_is_no_circle(manager: GPUResourceManager) -> None:
    for name in "ab":
        manager.register(name, Workshop().load)
    holder = Client(manager, "b").comes_in()
    worker = chain(manager, "a", "b")
    behind = Client(manager, "a").queues()
    holder.leaves()
    worker.result()
    behind.comes_in().leaves()


def test_a_loader_that_asks_for_its_own_model_is_refused(manager: GPUResourceManager) -> None:
    manager.register("own", lambda: use(manager, "own"))
    with pytest.raises(LeaseDeadlock) as caught:
        use(manager, "own")
    assert (caught.value.name, caught.value.holding) == ("own", ("own",))


def test_two_loaders_that_need_each_other_are_refused(manager: GPUResourceManager) -> None:
    at_a, at_b = Gate(), Gate()

    def load(gate: Gate, other: str) -> object:
        gate.pass_through()
        return use(manager, other)

    manager.register("a", lambda: load(at_a, "b"))
    manager.register("b", lambda: load(at_b, "a"))
    first, second = Worker(use, manager, "a"), Worker(use, manager, "b")
    at_a.wait_for_arrival()
    at_b.wait_for_arrival()
    at_a.open()
    managed = manager._managed_models["b"]
    assert await_that(manager, managed, lambda: sum(1 for _ in managed.leases.waiting()) == 2)
    at_b.open()
    for worker in (first, second):
        with pytest.raises(LeaseDeadlock):
            worker.result()


# -- whose request it is ----------------------------------------------------------------------------------------


def test_a_loader_sees_what_its_request_has_set_and_may_use_another_model(manager: GPUResourceManager) -> None:
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")
    workshop, seen = Workshop(), []

    def load() -> object:
        seen.append((who.get(), use(manager, "tts")))
        return workshop.load()

    manager.register("asr", load)

    def request() -> None:
        who.set("somebody")
        use(manager, "asr")

    Worker(request).result()
    assert [name for name, _ in seen] == ["somebody"]
    assert who.get() == "nobody"


def test_work_started_with_the_context_of_a_request_shares_its_lease(manager: GPUResourceManager) -> None:
    with manager.lease("tts") as engine:
        context = contextvars.copy_context()
        assert Worker(context.run, use, manager).result() is engine
        assert tts(manager)["leases"] == 1
        stranger = Client(manager).queues()
    stranger.comes_in().leaves()


def test_the_model_is_given_back_when_the_last_who_shares_it_has_left(
    manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    outer, inner = manager.lease("tts"), manager.lease("tts")
    outer.__enter__()
    inner.__enter__()
    context, request = contextvars.copy_context(), inner.request
    outer.__exit__()
    assert tts(manager)["leases"] == 1
    assert workshop.resident.log == []
    assert inner.place == 0
    inner.__exit__()
    assert workshop.resident.log == ["offload"]
    assert manager._admission.place(request) is None
    assert Worker(context.run, use, manager).result(), "a lease that has ended is shared with nobody"
    assert workshop.resident.log == ["offload", "restore", "offload"]


def test_a_lease_that_is_lost_is_given_back(manager: GPUResourceManager) -> None:
    def lose() -> None:
        manager.lease("tts").__enter__()

    Worker(lose).result()
    gc.collect()
    assert use(manager, timeout=None)
    managed = manager._managed_models["tts"]
    assert await_that(manager, managed, lambda: not managed.leases.in_use and managed.settled_state is State.HOST)


@pytest.mark.parametrize("broken", [True, False])
def test_a_lease_that_is_lost_with_a_broken_engine_has_it_dropped(broken: bool, manager: GPUResourceManager) -> None:
    manager.configure(keep_warm=-1)
    lease = manager.lease("tts")
    engine = lease.__enter__()
    if broken:
        lease.discard()
    del lease
    gc.collect()
    assert (Worker(use, manager).result() is engine) is not broken


@pytest.mark.parametrize("busy", ["the books", "starting a move"])
def test_a_generator_that_is_collected_where_its_manager_is_at_work_gives_its_lease_back(
    busy: str, manager: GPUResourceManager
) -> None:
    def stream() -> Iterator[object]:
        with manager.lease("tts") as engine:
            yield engine

    pieces = stream()
    next(pieces)
    # Python collects at any point: here, where this thread has the lock.
    with manager._dispatcher.lock if busy == "the books" else manager._moves._starting:
        pieces.close()
    assert manager.wait_for("tts", State.HOST, 60)
    assert tts(manager)["leases"] == 0


@pytest.mark.parametrize("how", ["a lease", "a generator", "an error"])
def test_a_program_that_ends_with_a_lease_in_force_ends(how: str) -> None:
    program = f"""
import logging
from gpu_manager import GPUResourceManager, SimulatedDevice
logging.disable(logging.WARNING)  # that an empty engine has nothing to move
manager = GPUResourceManager(SimulatedDevice(1000))
manager.register("tts", dict)
def stream():
    with manager.lease("tts") as engine:
        yield engine
pieces, lease = stream(), manager.lease("tts")
{"lease.__enter__()" if how == "a lease" else "next(pieces)"}
{"raise SystemExit(3)" if how == "an error" else ""}
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3 if how == "an error" else 0, "")


def test_a_lease_that_shares_can_be_cancelled_before_it_is_entered(manager: GPUResourceManager) -> None:
    with manager.lease("tts"):
        inner = manager.lease("tts")
        assert inner.cancel() is True
        with pytest.raises(RequestCancelled), inner:
            pass


def test_what_a_loader_has_started_may_use_the_model_once_it_is_loaded(manager: GPUResourceManager) -> None:
    loaded, workers = threading.Event(), []

    def later() -> object:
        assert loaded.wait(60)
        return use(manager, "other")

    def load() -> FakeEngine:
        workers.append(Worker(contextvars.copy_context().run, later))
        return Workshop().load()

    manager.register("other", load)
    use(manager, "other")
    loaded.set()
    assert workers[0].result()


def test_a_lease_made_before_the_end_is_refused_after_it(manager: GPUResourceManager) -> None:
    lease = manager.lease("tts")
    manager.close()
    with pytest.raises(ManagerClosed), lease:
        pass


def test_who_has_a_model_but_asks_in_another_context_is_a_stranger(manager: GPUResourceManager) -> None:
    with manager.lease("tts"), pytest.raises(ModelBusy):
        contextvars.Context().run(use, manager, "tts", 0)


def test_within_an_event_loop_another_threads_lease_is_waited_for(manager: GPUResourceManager) -> None:
    async def main() -> None:
        with pytest.raises(ModelBusy):
            use(manager, timeout=0)

    holder = Client(manager).comes_in()
    asyncio.run(main())
    holder.leaves()


def test_a_request_that_is_interrupted_while_it_waits_leaves_the_queue(
    manager: GPUResourceManager, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = Client(manager).comes_in()
    waits, here = clock.wait, threading.current_thread()

    def wait(event: threading.Lock, timeout_s: float = math.inf) -> None:
        if threading.current_thread() is here:
            raise KeyboardInterrupt
        waits(event, timeout_s)

    lease = manager.lease("tts")
    with monkeypatch.context() as patch:
        patch.setattr(clock, "wait", wait)
        with pytest.raises(KeyboardInterrupt), lease:
            pass
    assert tts(manager)["waiting"] == 0
    assert (lease.place, lease.cancel()) == (None, False)
    holder.leaves()
    assert tts(manager)["state"] == "cpu"
