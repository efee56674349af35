"""What is read of the call stacks of other threads."""

from __future__ import annotations

import gc
import linecache
import sys
import threading
from collections.abc import Iterator

import pytest

from residency.scheduling import callers
from residency.scheduling.callers import call_site


@pytest.fixture
def collected_in() -> Iterator[list[str]]:
    """The lines of the module in which garbage collections begin, while each object may begin one."""
    found: list[str] = []

    def note(phase: str, facts: object) -> None:
        frame = sys._getframe(1)
        if frame.f_globals.get("__name__") == callers.__name__:
            found.append(linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip())

    thresholds = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(1)
    yield found
    gc.set_threshold(*thresholds)
    gc.callbacks.remove(note)


def test_no_garbage_is_collected_while_python_lists_the_threads(collected_in: list[str]) -> None:
    there, leave = call_site(), threading.Lock()
    started = [threading.Event() for _ in range(20)]

    def wait(here: threading.Event) -> None:
        here.set()
        leave.acquire()
        leave.release()

    threads = [threading.Thread(target=wait, args=(here,)) for here in started]
    with leave:  # each thread has frames that are not objects yet
        for thread in threads:
            thread.start()
        assert all(here.wait(60) for here in started)
        assert there.executes()
        there.waits_for(call_site())
    for thread in threads:
        thread.join()
    assert not [line for line in collected_in if "sys._current_frames()" in line]
    assert gc.isenabled()


def test_garbage_collection_that_is_off_stays_off() -> None:
    gc.disable()
    try:
        assert call_site().executes()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_threads_that_look_at_once_leave_it_on() -> None:
    def look() -> None:
        for _ in range(200):
            call_site().executes()

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gc.isenabled()
