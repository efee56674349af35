"""The manual clock of the tests and of users' own tests."""

from __future__ import annotations

from fakes import Worker

from residency.clock import ManualClock
from residency.locks import new_event


def test_an_advance_between_now_and_wait_is_not_missed() -> None:
    clock = ManualClock()

    def wait() -> float:
        clock.now()
        Worker(clock.advance, 1.0).result()
        clock.wait(new_event())
        return clock.now()

    assert Worker(wait).result() == 1001.0
