"""Leases in generators, coroutines and thread pools, where the context does not tell who holds them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from types import FrameType
from typing import Any

import pytest
import torch
from fakes import Worker, Workshop, await_that
from streaming_engine import Speaker

from gpu_manager import (
    GPUResourceManager,
    LeaseDeadlock,
    RequestCancelled,
    RequestTimeout,
    SimulatedDevice,
    State,
)
from residency.clock import ManualClock
from tts_gpu_managed import GPUManagedTTS


@pytest.fixture
def shop() -> Iterator[GPUManagedTTS]:
    with GPUResourceManager(SimulatedDevice(1 << 30)) as manager:
        yield GPUManagedTTS(None, manager=manager, load=Speaker)


def held(manager: GPUResourceManager, name: str = "tts") -> dict[str, Any] | None:
    holder: dict[str, Any] | None = manager.status()["models"][name]["holder"]
    return holder


def step(generator: Iterator[Any]) -> Any:
    """One step as frameworks make it: with a fresh copy of the context, in a thread of a pool."""
    return Worker(contextvars.copy_context().run, next, generator, None).result()


def steps(generator: Iterator[Any]) -> list[Any]:
    found = []
    while (one := step(generator)) is not None:
        found.append(one)
    return found


# -- handlers that stream ---------------------------------------------------------------------------------------


def test_a_handler_reads_values_while_it_streams(shop: GPUManagedTTS) -> None:
    def handler() -> Iterator[str]:
        for chunk in shop.stream(3):
            yield f"{chunk.dim()} at {shop.sample_rate} with {shop.voice.weight.shape}"

    assert len(steps(handler())) == 3
    assert held(shop.manager) is None


@pytest.mark.parametrize("second", ["a call", "a lease", "a part", "another stream"])
def test_a_handler_makes_a_second_request_while_it_streams(shop: GPUManagedTTS, second: str) -> None:
    def ask() -> Any:
        if second == "a call":
            return shop.clone("", "", "")[1]
        if second == "a lease":
            with shop.lease() as engine:
                return engine.sample_rate
        if second == "a part":
            return shop.voice(torch.ones(4)).shape[0] * 6000
        return sum(1 for _ in shop.stream(2)) * 12_000

    def handler() -> Iterator[Any]:
        for _ in shop.stream(3):
            yield ask()

    assert steps(handler()) == [24_000] * 3
    assert held(shop.manager) is None


def test_a_lease_in_a_handler_is_its_own_at_each_step(shop: GPUManagedTTS) -> None:
    def handler() -> Iterator[int]:
        with shop.lease():
            for _ in range(3):
                with shop.lease() as engine:
                    yield engine.sample_rate

    assert steps(handler()) == [24_000] * 3
    assert held(shop.manager) is None


def test_values_are_read_beside_a_request_that_has_the_model(shop: GPUManagedTTS) -> None:
    stream = shop.stream(2)
    step(stream)
    assert Worker(lambda: (shop.sample_rate, float(shop.voice.bias.detach().sum()))).result()[0] == 24_000
    assert held(shop.manager) is not None
    stream.close()
    assert held(shop.manager) is None


def test_readers_do_not_keep_a_model_from_those_who_wait_for_it(manager: GPUResourceManager) -> None:
    holder = manager.lease("tts")
    holder.__enter__()
    reader = manager.lease("tts", reading=True)
    Worker(reader.__enter__).result()
    holder.__exit__()
    late = manager.lease("tts", reading=True)
    late_reader = Worker(late.__enter__)
    managed = manager._managed_models["tts"]
    assert await_that(manager, managed, lambda: late.request in managed.leases.waiting())
    reader.__exit__()
    late_reader.result()
    late.__exit__()


def test_a_strangers_request_waits_for_a_stream_and_is_served_after_it(shop: GPUManagedTTS) -> None:
    stream = shop.stream(2)
    step(stream)
    lease = shop.lease()
    stranger = Worker(lease.__enter__)
    managed = shop.manager._managed_models["tts"]
    assert await_that(shop.manager, managed, lambda: lease.request in managed.leases.waiting())
    assert len(steps(stream)) == 1
    stranger.result()
    lease.__exit__()


# -- waiting in circles -----------------------------------------------------------------------------------------


def holds(manager: GPUResourceManager, name: str) -> Iterator[None]:
    with manager.lease(name):
        yield


def takes(manager: GPUResourceManager, first: str, second: str) -> Iterator[str]:
    with manager.lease(first):
        yield first
        with manager.lease(second):
            yield second


@pytest.fixture
def pair() -> Iterator[GPUResourceManager]:
    with GPUResourceManager(SimulatedDevice(1 << 30)) as manager:
        for name in "ab":
            manager.register(name, Speaker)
        yield manager


def test_two_generators_in_opposite_order_are_told_of_their_deadlock(pair: GPUResourceManager) -> None:
    one, other = takes(pair, "a", "b"), takes(pair, "b", "a")
    step(one)
    step(other)
    waiting = Worker(contextvars.copy_context().run, next, one)
    managed = pair._managed_models["b"]
    assert await_that(pair, managed, lambda: managed.leases.next_request() is not None)
    with pytest.raises(LeaseDeadlock, match="holds b and waits for 'a'") as caught:
        step(other)
    assert caught.value.holder is not None
    assert "test_leases_in_generators.py" in caught.value.holder.where
    assert waiting.result() == "b"


def test_a_thread_that_resumes_both_generators_itself_is_told(pair: GPUResourceManager) -> None:
    one, other = takes(pair, "a", "b"), takes(pair, "b", "a")
    contextvars.copy_context().run(next, one)
    contextvars.copy_context().run(next, other)
    with pytest.raises(LeaseDeadlock) as caught:
        contextvars.copy_context().run(next, one)
    assert caught.value.holder is not None
    assert "in takes" in caught.value.holder.where


def test_a_generator_under_the_one_that_holds_the_model_is_told(pair: GPUResourceManager) -> None:
    def inner() -> Iterator[None]:
        with pair.lease("a"):
            yield

    def outer() -> Iterator[Any]:
        within = inner()
        next(within)
        yield "holds"
        with pair.lease("a") as engine:
            yield engine
        within.close()

    handler = outer()
    step(handler)
    with pytest.raises(LeaseDeadlock):
        step(handler)
    del handler


DELEGATES: dict[str, Callable[[ThreadPoolExecutor, Callable[[], Any]], Any]] = {
    "result": lambda pool, work: pool.submit(work).result(),
    "map": lambda pool, work: list(pool.map(lambda _: work(), range(2))),
    "wait": lambda pool, work: [one.result() for one in wait([pool.submit(work)]).done],
    "as_completed": lambda pool, work: [one.result() for one in as_completed([pool.submit(work)])],
}


@pytest.mark.parametrize("how", DELEGATES)
def test_a_holder_that_waits_for_a_pool_in_which_a_function_leases_is_told(shop: GPUManagedTTS, how: str) -> None:
    def work() -> Any:
        return shop.clone("", "", "")

    with ThreadPoolExecutor(1) as pool, shop.lease(), pytest.raises(LeaseDeadlock, match=r"in_generators\.py:"):
        DELEGATES[how](pool, work)
    assert shop.clone("", "", "")[1] == 24_000


def test_a_holder_that_joins_a_thread_which_leases_is_told_there(shop: GPUManagedTTS) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            shop.clone("", "", "")
        except LeaseDeadlock as error:
            errors.append(error)

    with shop.lease():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(errors) == 1


def test_a_holder_that_waits_for_a_limited_time_goes_on(shop: GPUManagedTTS) -> None:
    with shop.lease():
        worker = Worker(shop.clone, "", "", "")
        worker.join(0.2)
        assert worker.is_alive()
    assert worker.result()[1] == 24_000


@pytest.mark.parametrize("how", ["result", "join", "wait"])
def test_a_wait_with_a_time_out_for_work_that_leases_is_said_in_the_status_and_the_log(
    how: str, shop: GPUManagedTTS, caplog: pytest.LogCaptureFixture
) -> None:
    asked = shop.lease()

    def ask() -> None:
        with contextlib.suppress(RequestCancelled):
            asked.__enter__()

    def end_it() -> str:
        while (waits_for := (held(shop.manager) or {})["waits_for"]) is None:
            shop.manager.wait_for("tts", State.RELEASED, 0.01)
        while "which waits for the model" not in caplog.text:
            shop.manager.wait_for("tts", State.RELEASED, 0.01)
        asked.cancel()
        return str(waits_for)

    with ThreadPoolExecutor(1, "pool") as pool, shop.lease():
        watcher = Worker(end_it)
        if how == "join":
            thread = threading.Thread(target=ask, name="pool")
            thread.start()
            thread.join(60)
        elif how == "result":
            pool.submit(ask).result(60)
        else:
            wait([pool.submit(ask)], 60)
        assert watcher.result().startswith("pool")
        holder = held(shop.manager)
        assert holder is not None
        assert holder["waits_for"] is None


def test_a_holder_that_only_runs_beside_a_thread_is_waited_for(shop: GPUManagedTTS) -> None:
    asked = shop.lease()
    managed = shop.manager._managed_models["tts"]
    with shop.lease():
        thread = Worker(asked.__enter__)
        assert await_that(shop.manager, managed, lambda: asked.request in managed.leases.waiting())
    assert thread.result().sample_rate == 24_000
    asked.__exit__()


# -- activations that come one after the other ------------------------------------------------------------------


def test_a_lease_is_not_shared_with_a_later_call_of_the_function_that_took_it(pair: GPUResourceManager) -> None:
    leases: list[Any] = []

    def request() -> None:
        leases.append(pair.lease("a", 0.01 if leases else None))
        leases[-1].__enter__()

    contextvars.Context().run(request)
    for _ in range(8):  # whose frames are where the first one was
        with pytest.raises(RequestTimeout):
            contextvars.Context().run(request)
    leases[0].__exit__()


def test_a_stream_is_not_shared_with_another_one_that_the_same_code_steps_in_the_same_thread(
    shop: GPUManagedTTS,
) -> None:
    def handler() -> Iterator[Any]:
        with shop.lease(0.01):
            yield "in use"

    def make_step(generator: Iterator[Any]) -> Any:
        return next(generator)

    first = shop.stream(3)
    contextvars.Context().run(make_step, first)
    for _ in range(8):
        with pytest.raises(RequestTimeout):
            contextvars.Context().run(make_step, handler())
    first.close()


def test_a_generator_that_has_ended_is_not_taken_for_a_later_one_of_the_same_code(pair: GPUResourceManager) -> None:
    frames: list[FrameType] = []
    places: list[int] = []

    def outer(work: Callable[[], Any]) -> Iterator[Any]:
        places.append(id(sys._getframe()))
        if len(places) > 1:
            frames.append(sys._getframe())  # so that the next one lies elsewhere
        yield work()

    def ask() -> None:
        with pair.lease("a", 0.001):
            pass

    begun = holds(pair, "a")
    contextvars.Context().run(list, outer(lambda: next(begun)))
    try:
        while places[0] not in places[1:] and len(places) < 500:
            with pytest.raises(RequestTimeout):  # and not LeaseDeadlock: it does not go on with the inner generator
                contextvars.Context().run(list, outer(ask))
    finally:
        begun.close()


def traced(function: Callable[..., Any], *arguments: Any) -> Any:
    def trace(frame: FrameType, event: str, argument: object) -> Any:
        return trace

    sys.settrace(trace)
    try:
        return function(*arguments)
    finally:
        sys.settrace(None)


def test_streams_are_recognised_under_a_tracer(pair: GPUResourceManager) -> None:
    def ask() -> str:
        with pair.lease("a", 1):
            return "shares"

    def handler() -> Iterator[str]:
        with pair.lease("a"):
            for _ in range(3):
                yield ask()

    stream = handler()
    assert Worker(contextvars.copy_context().run, traced, next, stream).result() == "shares"
    assert steps(stream) == ["shares"] * 2
    assert held(pair, "a") is None


def test_under_a_tracer_no_request_is_taken_for_one_whose_frame_has_ended(pair: GPUResourceManager) -> None:
    def taken(timeout_s: float | None) -> Iterator[Any]:
        lease = pair.lease("a", timeout_s)
        lease.__enter__()
        yield lease

    lease = contextvars.Context().run(traced, lambda: next(taken(None)))
    for _ in range(30):  # its frame's address is used again
        with pytest.raises(RequestTimeout):
            Worker(contextvars.Context().run, traced, lambda: next(taken(0.001))).result()
    lease.__exit__()


# -- coroutines -------------------------------------------------------------------------------------------------


def test_a_lease_entered_in_a_worker_thread_is_its_coroutines(shop: GPUManagedTTS) -> None:
    async def main() -> list[int]:
        lease = shop.lease()
        await asyncio.to_thread(lease.__enter__)
        try:
            first = await asyncio.to_thread(shop.clone, "", "", "")
            with shop.lease() as engine:
                second = engine.sample_rate
            return [first[1], second]
        finally:
            await asyncio.to_thread(lease.__exit__)

    assert asyncio.run(main()) == [24_000, 24_000]
    assert held(shop.manager) is None


def test_coroutines_that_lease_side_by_side_take_turns(shop: GPUManagedTTS) -> None:
    inside: list[int] = []

    async def request(number: int) -> None:
        lease = shop.lease()
        await asyncio.to_thread(lease.__enter__)
        inside.append(number)
        await asyncio.sleep(0)
        assert inside == [number]
        inside.clear()
        await asyncio.to_thread(lease.__exit__)

    async def main() -> None:
        await asyncio.gather(*map(request, range(3)))  # fewer than the threads of the pool

    asyncio.run(main())


def test_leases_that_are_made_ahead_and_entered_in_threads_take_turns(shop: GPUManagedTTS) -> None:
    inside: list[object] = []

    def work(lease: Any) -> None:
        with lease:
            inside.append(lease)
            assert inside == [lease]
            inside.clear()

    async def main() -> None:
        await asyncio.gather(*[asyncio.to_thread(work, shop.lease()) for _ in range(8)])

    asyncio.run(main())


# -- never silence ----------------------------------------------------------------------------------------------


def test_a_wait_that_is_too_long_tells_who_has_the_model_since_when_and_where(shop: GPUManagedTTS) -> None:
    stream = shop.stream(2)
    step(stream)
    with pytest.raises(RequestTimeout) as caught:
        Worker(lambda: shop.lease(0.01).__enter__()).result()
    holder = caught.value.holder
    assert holder is not None
    assert holder.held_s >= 0
    assert holder.where in str(caught.value)
    assert holder.thread in str(caught.value)
    stream.close()


def test_the_status_says_who_has_a_model_and_since_when(manager: GPUResourceManager, clock: ManualClock) -> None:
    with manager.lease("tts"):
        clock.advance(5)
        holder = held(manager)
        assert holder is not None
        where = "scheduling/test_leases_in_generators.py"
        assert holder["where"].startswith(where), holder
        assert holder["where"].endswith("in test_the_status_says_who_has_a_model_and_since_when")
        assert (holder["thread"], holder["held_s"]) == (threading.current_thread().name, 5)
    assert held(manager) is None


def test_waiting_is_said_aloud(
    manager: GPUResourceManager, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    with manager.lease("tts"):
        waiting = manager.lease("tts")
        worker = Worker(waiting.__enter__)
        managed = manager._managed_models["tts"]
        assert await_that(manager, managed, lambda: waiting.request in managed.leases.waiting())
        while "has waited" not in caplog.text:
            clock.advance(31)
            worker.join(0.01)
        assert "test_waiting_is_said_aloud" in caplog.text
    worker.result()
    waiting.__exit__()


def test_a_manager_has_a_longest_wait_for_requests_that_name_none(clock: ManualClock) -> None:
    workshop = Workshop()
    with GPUResourceManager(SimulatedDevice(1 << 30), clock=clock, adopt=workshop.adopt, wait_timeout="10m") as manager:
        manager.register("tts", workshop.load)
        lease = manager.lease("tts")
        with manager.lease("tts"):
            worker = Worker(lease.__enter__)
            managed = manager._managed_models["tts"]
            assert await_that(manager, managed, lambda: lease.request in managed.leases.waiting())
            clock.advance(599)
            assert worker.is_alive()
            while worker.is_alive():
                clock.advance(1)
                worker.join(0.01)
        with pytest.raises(RequestTimeout):
            worker.result()


def test_the_longest_wait_does_not_count_the_load(clock: ManualClock) -> None:
    from fakes import Gate

    workshop = Workshop()
    workshop.gate = gate = Gate()
    with GPUResourceManager(SimulatedDevice(1 << 30), clock=clock, adopt=workshop.adopt, wait_timeout=5) as manager:
        manager.register("tts", workshop.load)
        lease = manager.lease("tts")
        worker = Worker(lease.__enter__)
        gate.wait_for_arrival()
        for _ in range(5):
            clock.advance(100)
            worker.join(0.01)
        behind = manager.lease("tts")
        second = Worker(behind.__enter__)
        managed = manager._managed_models["tts"]
        assert await_that(manager, managed, lambda: behind.request in managed.leases.waiting())
        clock.advance(100)
        gate.open()
        assert worker.result() is workshop.engines[0]
        clock.advance(4)  # of which the load was none
        second.join(0.05)
        assert second.is_alive()
        lease.__exit__()
        assert second.result() is workshop.engines[0]
        behind.__exit__()


# -- leases that are lost ---------------------------------------------------------------------------------------


def test_a_stream_lost_in_a_cycle_gives_its_lease_back_without_a_collection_by_python(shop: GPUManagedTTS) -> None:
    class Response:
        def __init__(self) -> None:
            self.body = shop.stream(3)
            self.me = self

    gc.disable()
    try:
        response = Response()
        step(response.body)
        del response
        managed = shop.manager._managed_models["tts"]
        assert await_that(shop.manager, managed, lambda: managed.leases.holder is None)
    finally:
        gc.enable()


class Response:
    """Refers to itself, as responses and jobs of frameworks do: dropping it ends nothing before Python collects."""

    def __init__(self, body: Iterator[Any]) -> None:
        self.body = body
        self.me = self
        next(body)


@pytest.fixture
def no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collections")
def test_a_request_is_no_deadlock_that_would_wait_for_a_stream_which_was_lost_in_a_cycle(
    pair: GPUResourceManager,
) -> None:
    def handler() -> Iterator[str]:
        contextvars.Context().run(Response, holds(pair, "a"))
        yield "has lost it"
        with pair.lease("a"):
            yield "served"

    assert steps(handler()) == ["has lost it", "served"]


@pytest.mark.usefixtures("no_collections")
def test_a_request_is_no_deadlock_whose_code_has_lost_what_the_holder_waits_for(pair: GPUResourceManager) -> None:
    def handler() -> Iterator[str]:
        contextvars.Context().run(Response, holds(pair, "a"))
        yield "has lost it"
        with pair.lease("b"):
            yield "served"

    mine, other = handler(), takes(pair, "b", "a")
    assert step(mine) == "has lost it"
    assert step(other) == "b"
    waiting = Worker(lambda: list(other))
    managed = pair._managed_models["a"]
    assert await_that(pair, managed, lambda: managed.leases.next_request() is not None)
    assert step(mine) == "served"
    assert waiting.result() == ["a"]
    mine.close()


def test_a_stream_that_goes_on_is_never_taken_for_lost(manager: GPUResourceManager, clock: ManualClock) -> None:
    def stream() -> Iterator[int]:
        with manager.lease("tts"):
            yield from range(3)

    generator = stream()
    assert step(generator) == 0
    for _ in range(10):
        clock.advance(60)
    assert held(manager) is not None
    assert [step(generator), step(generator), step(generator)] == [1, 2, None]
    assert held(manager) is None


def test_closing_within_a_stream_is_refused_and_does_not_wait_for_itself(shop: GPUManagedTTS) -> None:
    def handler() -> Iterator[str]:
        for _ in shop.stream(2):
            with pytest.raises(RuntimeError, match="would wait for the lease"):
                shop.manager.close()
            yield "refused"

    assert steps(handler()) == ["refused"] * 2
