"""Ctrl-C at any moment of a request: the next request is served, and nothing is left."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from fakes import Worker, Workshop, running

from gpu_manager import GPUResourceManager, SimulatedDevice

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers"),
    pytest.mark.usefixtures("unmeasured"),
]

INTERRUPTS = 20_000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 100


@pytest.fixture(autouse=True)
def alarms() -> Iterator[list[int]]:
    """The signals that came; each is a Ctrl-C. (Python handles one a while after the timer has run out.)"""
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    yield came
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


def use(manager: GPUResourceManager) -> None:
    with manager.lease("tts"):
        pass


def nested(manager: GPUResourceManager) -> None:
    with manager.lease("tts", timeout=60), manager.lease("tts"):
        pass


def by_hand(manager: GPUResourceManager) -> None:
    manager.warm("tts")
    manager.offload("tts")
    manager.release("tts")
    manager.configure(keep_warm=0)


def seconds_for(work: Callable, manager: GPUResourceManager) -> float:
    started_s = time.perf_counter()
    for _ in range(20):
        work(manager)
    return (time.perf_counter() - started_s) / 20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # interrupts within weakref callbacks
@pytest.mark.parametrize("keep_warm", [0, 60])
@pytest.mark.parametrize("work", [use, nested, by_hand])
def test_an_interrupt_at_any_moment_harms_nobody(work: Callable, keep_warm: int, alarms: list[int]) -> None:
    workshop, device = Workshop(), SimulatedDevice(1000)
    manager = GPUResourceManager(device, keep_warm=keep_warm, adopt=workshop.adopt)
    manager.register("tts", workshop.load)
    longest_s = 3 * seconds_for(work, manager)
    delays = random.Random(1)
    came = Counter[bool]()
    for _ in range(INTERRUPTS):
        interrupted = False
        alarms.clear()
        try:
            signal.setitimer(signal.ITIMER_REAL, delays.uniform(1e-6, longest_s))
            while not alarms:
                work(manager)
        except KeyboardInterrupt:
            interrupted = True
        came[interrupted] += 1
        # Another thread sees at once whether something was left held.
        Worker(use, manager).result()
    assert came[True] > INTERRUPTS / 5, "too many came where Python ignores them"
    assert manager.release("tts") is True
    assert Worker(manager.close).result() is True
    assert all(engine.resident.place == "nowhere" for engine in workshop.engines)
    for thread in running("gpu-"):
        thread.join(10)
        assert not thread.is_alive(), thread
