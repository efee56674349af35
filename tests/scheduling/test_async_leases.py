"""Leases that coroutines take with ``async with``: no thread of the executor waits, and nothing blocks the loop."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fakes import Client, Gate, Workshop, await_that

from gpu_manager import (
    EventLoopBlocked,
    GPUResourceManager,
    Lease,
    ModelBusy,
    RequestCancelled,
    RequestTimeout,
    SimulatedDevice,
    State,
)

pytestmark = pytest.mark.usefixtures("unmeasured")


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


@pytest.fixture
def manager(workshop: Workshop) -> Iterator[GPUResourceManager]:
    with GPUResourceManager(SimulatedDevice(1 << 20), adopt=Workshop.adopt) as manager:
        manager.register("tts", workshop.load)
        manager.register("asr", Workshop().load)
        yield manager


def is_free(manager: GPUResourceManager, name: str = "tts") -> bool:
    return await_that(manager, manager._managed_models[name], lambda: not manager._managed_models[name].leases.in_use)


def use(manager: GPUResourceManager, name: str = "tts", timeout: float | None = None) -> Any:
    with manager.lease(name, timeout) as engine:
        return engine


async def use_async(manager: GPUResourceManager, name: str = "tts", timeout: float | None = None) -> Any:
    async with manager.lease(name, timeout) as engine:
        return engine


async def until_it_waits(manager: GPUResourceManager, name: str = "tts", count: int = 1) -> None:
    while sum(1 for _ in manager._managed_models[name].leases.waiting()) < count:
        await asyncio.sleep(0)


def test_a_coroutine_has_the_engine_until_its_block_ends(manager: GPUResourceManager, workshop: Workshop) -> None:
    async def main() -> None:
        async with manager.lease("tts") as engine:
            assert engine is workshop.engines[0]
            assert manager.status()["models"]["tts"]["holder"]["where"].endswith("in main")
        assert manager.status()["models"]["tts"]["holder"] is None

    asyncio.run(main())
    assert manager.wait_for("tts", State.HOST, 10)


def test_holders_may_use_the_executor_however_many_wait(manager: GPUResourceManager) -> None:
    async def request() -> int:
        async with manager.lease("tts"):
            return await asyncio.to_thread(threading.get_ident)

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        assert len(set(await asyncio.gather(*[request() for _ in range(20)]))) == 1

    asyncio.run(main())


def test_coroutines_take_turns_in_the_order_of_their_arrival(manager: GPUResourceManager) -> None:
    inside: list[int] = []
    served: list[int] = []

    async def request(number: int) -> None:
        async with manager.lease("tts"):
            inside.append(number)
            await asyncio.sleep(0)
            assert inside == [number]
            inside.clear()
            served.append(number)

    async def main() -> None:
        await asyncio.gather(*map(request, range(10)))

    asyncio.run(main())
    assert served == list(range(10))


@pytest.mark.parametrize("how", ["async with", "with", "a thread", "a task"])
def test_requests_of_the_coroutine_that_has_the_model_share_its_lease(manager: GPUResourceManager, how: str) -> None:
    async def main() -> Any:
        async with manager.lease("tts") as engine:
            if how == "async with":
                assert await use_async(manager) is engine
            elif how == "with":
                assert use(manager) is engine
            elif how == "a thread":
                assert await asyncio.to_thread(use, manager) is engine
            else:
                assert await asyncio.create_task(use_async(manager)) is engine

    asyncio.run(asyncio.wait_for(main(), 30))
    assert is_free(manager)


def test_an_asynchronous_generator_that_has_the_model_shares_with_itself_alone(manager: GPUResourceManager) -> None:
    async def stream() -> AsyncIterator[Any]:
        async with manager.lease("tts"):
            for _ in range(3):
                yield await contextvars.Context().run(asyncio.create_task, use_async(manager, "asr"))
                await use_async(manager)

    async def main() -> None:
        chunks = stream()
        await anext(chunks)
        with pytest.raises(RequestTimeout):
            await contextvars.Context().run(asyncio.create_task, use_async(manager, "tts", 0.01))
        assert [1 async for _ in chunks] == [1, 1]

    asyncio.run(main())
    assert is_free(manager)


def test_the_loop_goes_on_while_the_model_is_loaded(manager: GPUResourceManager, workshop: Workshop) -> None:
    workshop.gate = gate = Gate()

    async def open_gate() -> None:
        while not gate.arrived:
            await asyncio.sleep(0)
        gate.open()

    async def main() -> None:
        engine, _ = await asyncio.gather(use_async(manager), open_gate())
        assert engine is workshop.engines[0]

    asyncio.run(main())


def test_what_a_loader_raises_is_raised_to_the_coroutine(manager: GPUResourceManager, workshop: Workshop) -> None:
    workshop.fail_next = OSError("no such file")
    with pytest.raises(OSError, match="no such file"):
        asyncio.run(use_async(manager))
    assert asyncio.run(use_async(manager)) is workshop.engines[0]


def test_a_task_that_is_cancelled_gives_its_place_in_the_queue_up(manager: GPUResourceManager) -> None:
    holder = Client(manager).comes_in()

    async def main() -> None:
        first, second = (asyncio.create_task(use_async(manager)) for _ in range(2))
        await until_it_waits(manager, count=2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert manager.status()["models"]["tts"]["waiting"] == 1
        holder.leaves()
        await second

    asyncio.run(main())
    assert is_free(manager)


def test_a_task_that_is_cancelled_as_it_is_served_gives_the_model_back(manager: GPUResourceManager) -> None:
    async def main() -> None:
        holder = manager.lease("tts")
        await holder.__aenter__()
        waiting = contextvars.Context().run(asyncio.create_task, use_async(manager))
        behind = contextvars.Context().run(asyncio.create_task, use_async(manager))
        await until_it_waits(manager, count=2)
        await holder.__aexit__()  # serves the task, which has not gone on yet
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await behind

    asyncio.run(asyncio.wait_for(main(), 30))
    assert is_free(manager)


def test_a_loop_that_ends_takes_the_requests_of_its_tasks_with_it(manager: GPUResourceManager) -> None:
    holder = Client(manager).comes_in()

    async def main() -> None:
        tasks.append(asyncio.create_task(use_async(manager)))
        await until_it_waits(manager)

    tasks: list[asyncio.Task[Any]] = []
    asyncio.run(main())
    assert manager.status()["models"]["tts"]["waiting"] == 0
    holder.leaves()


def test_a_coroutine_is_told_that_it_has_waited_too_long_or_was_cancelled(manager: GPUResourceManager) -> None:
    holder = Client(manager).comes_in()

    async def main() -> None:
        with pytest.raises(ModelBusy):
            await use_async(manager, timeout=0)
        with pytest.raises(RequestTimeout, match=r"fakes\.py"):
            await use_async(manager, timeout=0.01)
        lease = manager.lease("tts")
        entering = asyncio.create_task(lease.__aenter__())
        await until_it_waits(manager)
        assert lease.cancel()
        with pytest.raises(RequestCancelled):
            await entering

    asyncio.run(main())
    holder.leaves()


def test_coroutines_in_opposite_order_are_told_of_their_deadlock(manager: GPUResourceManager) -> None:
    async def takes(first: str, second: str, mine: asyncio.Event, theirs: asyncio.Event) -> str:
        async with manager.lease(first):
            mine.set()
            await theirs.wait()
            return await use_async(manager, second) and second

    async def main() -> list[Any]:
        one, other = asyncio.Event(), asyncio.Event()
        both = takes("tts", "asr", one, other), takes("asr", "tts", other, one)
        return await asyncio.gather(*both, return_exceptions=True)

    found = asyncio.run(main())
    assert sorted(type(one).__name__ for one in found) == ["LeaseDeadlock", "str"]


def test_a_coroutine_that_would_block_the_loop_in_which_the_holder_runs_is_told(manager: GPUResourceManager) -> None:
    async def main() -> None:
        async with manager.lease("tts"):
            with pytest.raises(EventLoopBlocked, match=r"in main .*Use `async with`.*请用 async with"):
                await contextvars.Context().run(asyncio.create_task, blocking())

    async def blocking() -> None:
        use(manager)

    asyncio.run(main())


@pytest.mark.parametrize("call", ["close", "unregister"])
def test_who_would_wait_in_the_loop_for_one_of_its_tasks_is_told(call: str, manager: GPUResourceManager) -> None:
    async def main() -> None:
        begun, over = asyncio.Event(), asyncio.Event()

        async def child() -> None:
            async with manager.lease("tts"):
                begun.set()
                await over.wait()

        task = asyncio.create_task(child())
        await begun.wait()
        with pytest.raises(EventLoopBlocked, match="in child"):
            manager.close() if call == "close" else manager.unregister("tts")
        over.set()
        await task

    asyncio.run(main())
    assert use(manager) is not None


@pytest.mark.parametrize("end", ["closed", "dropped"])
def test_a_request_whose_loop_has_ended_is_passed_over(end: str, manager: GPUResourceManager) -> None:
    client = Client(manager)
    client.comes_in()
    kept = []

    def in_a_loop() -> None:
        loop = asyncio.new_event_loop()
        task = loop.create_task(use_async(manager))
        loop.run_until_complete(until_it_waits(manager))
        if end == "closed":
            loop.close()
            kept.append(task)

    in_a_loop()
    gc.collect()
    client.leaves()
    assert use(manager, timeout=30) is not None
    assert is_free(manager)


def test_tasks_that_are_started_beside_the_one_that_enters_a_lease_take_turns(manager: GPUResourceManager) -> None:
    inside: list[int] = []

    async def enters(lease: Lease) -> None:
        async with lease:
            inside.append(len(inside))
            await asyncio.sleep(0)
            assert inside == [0]
            inside.clear()

    async def main() -> None:
        handle = manager.lease("tts")  # kept by the parent, to cancel it
        await asyncio.gather(enters(handle), *(enters(manager.lease("tts")) for _ in range(3)))

    asyncio.run(main())


def test_a_lease_that_is_entered_in_a_pool_is_named_by_the_line_that_made_it(manager: GPUResourceManager) -> None:
    async def main() -> str:
        lease = manager.lease("tts")
        await asyncio.to_thread(lease.__enter__)
        where: str = manager.status()["models"]["tts"]["holder"]["where"]
        lease.__exit__()
        return where

    assert asyncio.run(main()).endswith("in main")


def test_coroutines_and_threads_wait_for_each_other(manager: GPUResourceManager) -> None:
    async def main() -> Client:
        async with manager.lease("tts"):
            thread = contextvars.Context().run(Client, manager).queues()
        await asyncio.to_thread(thread.comes_in)
        waiting = asyncio.create_task(use_async(manager))
        await until_it_waits(manager)
        thread.leaves()
        await waiting
        return thread

    asyncio.run(main())
    assert is_free(manager)


def test_a_coroutine_that_is_lost_gives_its_lease_back(manager: GPUResourceManager) -> None:
    async def lost(holds: asyncio.Event) -> None:
        async with manager.lease("tts"):
            holds.set()
            await asyncio.get_running_loop().create_future()

    loop = asyncio.new_event_loop()
    task = loop.create_task(lost(holds := asyncio.Event()))
    loop.run_until_complete(holds.wait())
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    del task, loop, holds
    gc.collect()
    assert is_free(manager)


def test_the_device_is_not_asked_in_the_event_loop_whether_it_is_lost() -> None:
    asked: list[int] = []

    class Card(SimulatedDevice):
        def is_usable(self) -> bool:
            asked.append(threading.get_ident())
            return False

    workshop = Workshop()

    async def main() -> None:
        async with manager.lease("tts"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with GPUResourceManager(Card(1 << 20), adopt=Workshop.adopt) as manager:
        manager.register("tts", workshop.load)
        with pytest.raises(RuntimeError, match="illegal"):
            asyncio.run(main())
        assert is_free(manager)
        assert asked
        assert threading.get_ident() not in asked
        assert use(manager) is workshop.engines[1]


def test_what_goes_through_an_asynchronous_generator_shares_its_lease(manager: GPUResourceManager) -> None:
    async def stream() -> AsyncIterator[object]:
        async with manager.lease("tts") as engine:
            yield engine
            yield engine

    async def main() -> None:
        async for engine in stream():
            assert await use_async(manager) is engine

    asyncio.run(main())
    assert is_free(manager)


def test_tasks_share_the_lease_of_the_code_that_starts_them_unless_they_have_a_context_of_their_own(
    manager: GPUResourceManager,
) -> None:
    inside: list[int] = []
    most: list[int] = []

    async def job(number: int, others: asyncio.Event, alone: bool) -> None:
        async with manager.lease("tts"):
            inside.append(number)
            most.append(len(inside))
            if len(inside) == 2 or alone:
                others.set()
            await others.wait()
            inside.remove(number)

    async def dispatch(context: Callable[[], contextvars.Context], alone: bool) -> None:
        others = asyncio.Event()
        async with manager.lease("tts"):
            jobs = [context().run(asyncio.create_task, job(number, others, alone)) for number in range(2)]
            if not alone:
                await asyncio.gather(*jobs)
        await asyncio.gather(*jobs)

    asyncio.run(dispatch(contextvars.copy_context, alone=False))
    assert most == [1, 2]
    asyncio.run(dispatch(contextvars.Context, alone=True))
    assert most == [1, 2, 1, 1]


def test_leases_that_a_dispatcher_hands_to_tasks_are_one_request_unless_each_task_takes_its_own(
    manager: GPUResourceManager,
) -> None:
    order: list[str] = []

    async def job(name: str, lease: Lease) -> None:
        order.append(f"{name} begins")
        await asyncio.sleep(0)
        order.append(f"{name} ends")
        await lease.__aexit__()

    async def takes_its_own(name: str) -> None:
        lease = manager.lease("tts")
        await lease.__aenter__()
        await job(name, lease)

    async def hands_over() -> None:
        jobs = []
        for name in "ab":
            lease = manager.lease("tts")
            await lease.__aenter__()  # the second would wait for the first, which this code has, and may yet leave
            jobs.append(asyncio.create_task(job(name, lease)))
        await asyncio.gather(*jobs)

    async def starts() -> None:
        await asyncio.gather(*[asyncio.create_task(takes_its_own(name)) for name in "ab"])

    asyncio.run(hands_over())
    assert order == ["a begins", "b begins", "a ends", "b ends"]
    order.clear()
    asyncio.run(starts())
    assert order == ["a begins", "a ends", "b begins", "b ends"]
    assert is_free(manager)
