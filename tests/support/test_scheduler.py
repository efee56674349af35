"""The seeded scheduler finds and replays classic races, and reports none in correct code."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from scheduler import Deadlock, Scheduler

from residency import clock as clock_module

SEEDS = range(300)


def first_failure(scenario: Callable[[Scheduler], Any], seeds: range = SEEDS) -> tuple[int, str, Scheduler]:
    """Returns the first seed that fails, with its message and scheduler."""
    for seed in seeds:
        scheduler = Scheduler.varied(seed)
        try:
            scenario(scheduler)
        except AssertionError as error:
            return seed, str(error), scheduler
    pytest.fail(f"none of {len(seeds)} seeds found it")


def lost_update(scheduler: Scheduler) -> None:
    count = [0]

    def add() -> None:
        seen = count[0]
        scheduler.step("between read and write")
        count[0] = seen + 1

    scheduler.run(add, add)
    assert count == [2]


def lock_order(scheduler: Scheduler) -> None:
    a, b = scheduler.Lock(), scheduler.Lock()

    def forth() -> None:
        with a, b:
            pass

    def back() -> None:
        with b, a:
            pass

    scheduler.run(forth, back)


def lost_wake_up(scheduler: Scheduler) -> None:
    ready, waiting = [False], list[Any]()

    def wait() -> None:
        if not ready[0]:
            event = scheduler.Lock()
            event.acquire()
            waiting.append(event)  # too late if the other thread has already checked
            event.acquire()

    def wake() -> None:
        ready[0] = True
        scheduler.step()
        for event in waiting:
            event.release()

    scheduler.run(wait, wake)


def deep_order(scheduler: Scheduler) -> None:
    """Fails only if one thread pauses at one particular step during all forty steps of the other."""
    done = [0]

    def long() -> None:
        for _ in range(40):
            scheduler.step()
            done[0] += 1

    def short() -> None:
        scheduler.step()
        before = done[0]
        scheduler.step()
        assert done[0] - before < 40

    scheduler.run(long, short)


def counting(scheduler: Scheduler) -> None:
    """Correct: four threads count under a lock."""
    lock, count = scheduler.Lock(), [0]

    def work() -> None:
        for _ in range(4):
            with lock:
                seen = count[0]
                scheduler.step()
                count[0] = seen + 1

    scheduler.run(work, work, work, work)
    assert count == [16]


def wait_for_ever(scheduler: Scheduler) -> None:
    event = scheduler.Lock()
    event.acquire()
    event.acquire()


def check(truth: bool, message: str) -> None:
    assert truth, message


@pytest.mark.parametrize("scenario", [lost_update, lock_order, lost_wake_up, deep_order])
def test_a_classic_race_is_found_and_its_seed_replays_it(scenario: Callable[[Scheduler], Any]) -> None:
    seed, says, found = first_failure(scenario)
    again = Scheduler.varied(seed)
    with pytest.raises(AssertionError) as failure:
        scenario(again)
    assert str(failure.value) == says
    assert again.trace == found.trace
    assert again.steps == len(again.trace)


def test_priorities_find_what_a_coin_at_every_point_does_not() -> None:
    def found(**strategy: Any) -> int:
        count = 0
        for seed in range(100):
            try:
                deep_order(Scheduler(seed, length=50, **strategy))
            except AssertionError:
                count += 1
        return count

    assert found() == 0
    assert found(changes=2) > 0


def test_a_deadlock_says_who_waits_for_what_where_and_how_it_came() -> None:
    seed, says, found = first_failure(lock_order)
    assert f"seed={seed}," in says
    assert "2:forth: wait for Lock-2(test_scheduler.py:" in says
    assert "3:back: wait for Lock-1(test_scheduler.py:" in says
    assert "held by 3:back\n      test_scheduler.py:" in says
    assert says.endswith("\n".join(["Last steps:", *(f"  {' '.join(step)}" for step in found.trace[-40:])]))


def test_the_same_seed_gives_the_same_trace_and_other_seeds_other_ones() -> None:
    def trace(seed: int) -> tuple[tuple[str, str, str], ...]:
        scheduler = Scheduler.varied(seed)
        counting(scheduler)
        return tuple(scheduler.trace)

    traces = [trace(seed) for seed in range(60)]
    assert traces == [trace(seed) for seed in range(60)]
    assert len(set(traces)) > 50


def test_a_timeout_races_with_the_release_and_either_wins() -> None:
    def outcome(seed: int) -> tuple[bool, float]:
        scheduler = Scheduler(seed, jump_probability=0.2)
        lock = scheduler.Lock()
        lock.acquire()

        def release() -> None:
            for _ in range(4):
                scheduler.step()
            lock.release()

        got, _ = scheduler.run(lambda: lock.acquire(timeout=5), release)
        return got, scheduler.now()

    seen = [outcome(seed) for seed in SEEDS]
    assert {got for got, _ in seen} == {True, False}
    assert {now_s for _, now_s in seen} <= {1000.0, 1005.0}


def test_time_goes_to_the_next_deadline_when_nobody_can_run() -> None:
    scheduler = Scheduler(jump_probability=0)
    clock, woken = scheduler.clock(), []
    events = [scheduler.Lock() for _ in range(4)]

    def wait(event: Any, timeout_s: float) -> Callable[[], None]:
        def function() -> None:
            clock.wait(event, timeout_s)
            woken.append(clock.now())

        event.acquire()
        return function

    times = (20, 10, -1, 50)
    scheduler.run(*(wait(event, seconds) for event, seconds in zip(events, times, strict=True)))
    assert woken == [1000.0, 1010.0, 1020.0, 1050.0]


def test_daemons_end_with_the_run_even_those_that_look_after_themselves() -> None:
    before = threading.enumerate()
    for seed in range(30):
        scheduler = Scheduler.varied(seed)
        lock = scheduler.Lock()
        undone: list[str] = []

        def watch(scheduler: Scheduler = scheduler, lock: Any = lock, undone: list[str] = undone) -> None:
            try:
                wait_for_ever(scheduler)
            except BaseException:
                with lock:  # held by another daemon, which waits
                    undone.append("watch")
                raise

        def hold(scheduler: Scheduler = scheduler, lock: Any = lock) -> None:
            with lock:
                wait_for_ever(scheduler)

        def main(scheduler: Scheduler = scheduler, watch: Any = watch, hold: Any = hold) -> list[Any]:
            daemons = [scheduler.Thread(target=target, daemon=True) for target in (watch, hold)]
            for daemon in daemons:
                daemon.start()
            for _ in range(30):
                scheduler.step()
            assert all(daemon.is_alive() for daemon in daemons)
            return daemons

        (daemons,) = scheduler.run(main)
        assert len(undone) <= 1
        assert not any(daemon.is_alive() for daemon in daemons)
        daemons[0].join()
        assert lock._owner is None
        assert threading.enumerate() == before


def test_a_broken_invariant_ends_the_run_with_its_seed_whatever_is_held() -> None:
    scheduler = Scheduler(7)
    lock, value = scheduler.Lock(), [0]

    def work() -> None:
        with lock:
            value[0] += 1
            scheduler.step("inside")
            value[0] += 1

    with pytest.raises(AssertionError, match=r"odd") as failure:
        scheduler.run(work, work, invariant=lambda: check(value[0] % 2 == 0, "odd"))
    assert "seed=7," in str(failure.value)
    assert str(failure.value).endswith("step inside")
    assert lock._owner is None
    with pytest.raises(RuntimeError, match="the invariant waits"):
        scheduler.run(work, invariant=lock.acquire)


def test_an_error_in_any_thread_is_raised_and_names_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    scheduler = Scheduler(3)

    def fail() -> None:
        raise LookupError("lost")

    def start() -> None:
        scheduler.Thread(target=fail, daemon=True).start()
        wait_for_ever(scheduler)

    with pytest.raises(LookupError, match="lost") as failure:
        scheduler.run(start)
    notes = [*getattr(failure.value, "__notes__", []), capsys.readouterr().err]
    assert "seed=3," in "".join(notes)


def test_a_thread_that_polls_for_ever_runs_out_of_steps() -> None:
    for strategy in ({}, {"switch_probability": 0.1}, {"changes": 2}):
        scheduler = Scheduler(**strategy)
        stop = [False]

        def poll(scheduler: Scheduler = scheduler, stop: list[bool] = stop) -> None:
            while not stop[0]:
                scheduler.step()

        def end(scheduler: Scheduler = scheduler, stop: list[bool] = stop) -> None:
            scheduler.step()
            stop[0] = True

        scheduler.run(poll, poll, end)  # no polling thread starves the awaited one
        stop[0] = False
        with pytest.raises(Deadlock, match="steps ran out"):
            scheduler.run(poll, steps=1000)


def test_a_thread_that_waits_for_something_real_is_named() -> None:
    scheduler = Scheduler(stall_s=0.05, switch_probability=1)
    real = threading.Lock()

    def hold() -> None:
        with real:
            for _ in range(20):
                scheduler.step()

    with pytest.raises(Deadlock, match=":hold stalls"):
        scheduler.run(hold, hold)
    assert not real.locked()


def test_misuse_is_told_as_threading_tells_it() -> None:
    scheduler = Scheduler()
    lock, rlock = scheduler.Lock(), scheduler.RLock()

    def main() -> None:
        for misuse in (lock.release, rlock.release):
            with pytest.raises(RuntimeError, match="un-acquired"):
                misuse()
        with rlock, rlock, lock:
            assert not lock.acquire(blocking=False)
            assert not lock.acquire(timeout=1)
        with pytest.raises(OverflowError):
            lock.acquire(timeout=scheduler.TIMEOUT_MAX * 2)
        me = scheduler.current_thread()
        assert isinstance(me, scheduler.Thread)
        assert (me.name, me.ident, me.is_alive(), me.daemon) == ("main", me._number, True, False)
        with pytest.raises(RuntimeError):
            me.join()
        with pytest.raises(RuntimeError):
            me.start()

    scheduler.run(main)
    with pytest.raises(AssertionError):
        scheduler.run(lambda: check(not lock.acquire() or lock.acquire(), ""))  # a Lock is not reentrant


def test_what_is_made_outside_of_a_run_works_there_and_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler()
    monkeypatch.setattr(clock_module, "threading", scheduler)
    event = scheduler.Lock()
    began: list[str] = []
    thread = scheduler.Thread(target=lambda: began.append(scheduler.current_thread().name), name="early")
    thread.start()
    event.acquire()
    assert not event.acquire(timeout=3)
    assert scheduler.now() == 1003
    clock_module.SystemClock().wait(event, 1e300)
    with pytest.raises(Deadlock, match="outside of run"):
        event.acquire()
    with pytest.raises(Deadlock, match="outside of run"):
        thread.join()
    assert not began
    scheduler.run()
    thread.join()
    assert began == ["early"]
    event.release()
    assert scheduler.run(event.acquire) == [True]
