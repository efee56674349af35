"""A one-shot event: a thread or a coroutine waits for it until a thread sets it, once.

It is a bare lock that is held until it is set. Unlike a `threading.Condition`, whose methods are Python code, it
survives an interrupt (Ctrl-C) of the waiting thread at any moment: no lock is left held or released too early.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import weakref
from typing import Any, Protocol

_LONGEST_WAIT_S = 86400.0


class OneShotEvent(Protocol):
    """`threading.Lock`, or `AsyncOneShotEvent`."""

    def release(self) -> object:
        """Set it; RuntimeError if it is set."""


def new_event() -> threading.Lock:
    """An event that is not set."""
    event = threading.Lock()
    event.acquire()
    return event


def holds(lock: Any) -> bool:
    """Whether this thread has this `threading.RLock`: `threading.Condition` asks it so, too."""
    return bool(lock._is_owned())


def set_event(event: OneShotEvent) -> None:
    """Wake the thread or coroutine that waits for it. Setting it twice is no error."""
    with contextlib.suppress(RuntimeError):  # it is set
        event.release()


class AsyncOneShotEvent:
    """An event for which a coroutine of the running event loop waits. Any thread sets it.

    The loop keeps the coroutine that waits, as it does for a timer; the event does not. So a task whose loop is dropped
    can be collected, although its request is still in a queue.
    """

    def __init__(self) -> None:
        self._loop = weakref.ref(asyncio.get_running_loop())
        self._is_set = False
        self._woken: weakref.ref[asyncio.Future[None]] | None = None

    @property
    def is_dead(self) -> bool:
        """Whether the loop was closed or dropped: the coroutine cannot go on."""
        loop = self._loop()
        return loop is None or loop.is_closed()

    def release(self) -> None:
        loop = self._loop()
        if loop is not None:
            loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        self._is_set = True
        woken = self._woken() if self._woken is not None else None
        if woken is not None:
            _wake(woken)

    async def wait(self, timeout_s: float = math.inf) -> None:
        """Wait until it is set, ``timeout_s`` at most; a day at most."""
        if self._is_set:
            return
        loop = asyncio.get_running_loop()
        woken = loop.create_future()
        self._woken = weakref.ref(woken)
        timer = loop.call_later(min(max(0.0, timeout_s), _LONGEST_WAIT_S), _wake, woken)
        try:
            await woken
        finally:
            timer.cancel()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
