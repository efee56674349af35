"""The thread behind the deadlines: there when it is wanted, asleep when nothing is due, and not to be got rid of."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator

import pytest
from fakes import Gate, running

from residency.clock import ManualClock
from residency.scheduling.monitor import PAUSE_AFTER_ERROR_S, IdleMonitor


class World:
    """A monitor, and what it is to look at: ``looks`` counts, ``errors`` are raised one after the other."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.lock = threading.RLock()
        self.deadline_s = math.inf
        self.looks = 0
        self.errors: list[BaseException] = []
        self.looked = threading.Semaphore(0)
        self.monitor = IdleMonitor(self.lock, self.clock, self.look, lambda: None)

    def look(self) -> float:
        self.looks += 1
        self.looked.release()
        if self.errors:
            raise self.errors.pop(0)
        return self.deadline_s

    def expect(self, deadline_s: float) -> None:
        with self.lock:
            self.deadline_s = deadline_s
            self.monitor.expect_locked(deadline_s)

    def looks_again(self) -> None:
        assert self.looked.acquire(timeout=60)

    def sleeps(self) -> bool:
        """Soon, and for good: nothing but time or a new deadline wakes it."""
        until = threading.Event()
        return any(len(self.clock._waiting) == 1 or until.wait(0.01) for _ in range(6000))


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.monitor.stop()
    assert not world.monitor.health()["alive"]


def test_one_thread_for_all_deadlines_that_sleeps_until_the_next(world: World) -> None:
    assert world.monitor.health() == {"alive": False, "errors": 0, "last_error": None}
    world.expect(1100)
    world.looks_again()
    thread = world.monitor._thread
    for deadline_s in (1200, 1050, 1060):
        world.expect(deadline_s)
    world.looks_again()  # for 1050, which is earlier
    assert world.sleeps()
    assert world.looks == 2
    assert world.monitor._thread is thread
    assert thread is not None
    assert (thread.name, thread.daemon) == ("gpu-idle-monitor", True)
    world.clock.advance(50)
    world.looks_again()


def test_after_an_error_it_waits_a_moment_and_counts_on(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.errors = [ZeroDivisionError("first"), SystemExit("second")]
    world.expect(1100)
    for seen in (1, 2):
        world.looks_again()
        assert world.sleeps()
        assert world.looks == seen
        world.clock.advance(PAUSE_AFTER_ERROR_S)
    world.looks_again()
    assert world.monitor.health() == {"alive": True, "errors": 2, "last_error": "SystemExit: second"}
    assert caplog.messages == ["The idle monitor met an error and goes on"] * 2
    assert all(record.exc_info for record in caplog.records)


def test_where_no_thread_can_be_had_the_next_deadline_tries_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        world.expect(1100)
    assert caplog.record_tuples == [
        ("residency.scheduling.monitor", logging.WARNING, "The idle monitor cannot be started now")
    ]
    assert caplog.records[0].exc_info
    assert world.monitor.health()["alive"] is False
    world.expect(1100)
    world.looks_again()
    assert world.monitor.health()["alive"] is True


def test_who_stops_it_finds_it_ended_and_nothing_starts_it_again(world: World) -> None:
    world.expect(1100)
    world.looks_again()
    world.monitor.stop()
    assert not world.monitor.health()["alive"]
    world.expect(1001)
    assert not world.monitor.health()["alive"]


def test_it_can_be_stopped_by_what_it_does_itself(world: World) -> None:
    gate = Gate()
    world.monitor._act = lambda: (gate.pass_through(), world.monitor.stop())  # type: ignore[func-returns-value]
    world.expect(1100)
    gate.wait_for_arrival()
    gate.open()
    for thread in running("gpu-idle-monitor"):
        thread.join(60)
    assert not world.monitor.health()["alive"]
