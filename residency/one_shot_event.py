"""A event: a thread or a coroutine waits on it until a thread opens it, once.

A bare lock that is held until it is opened. Unlike a `threading.Condition`, whose methods are Python code, it survives
an interrupt (Ctrl-C) of the waiting thread at any moment: nothing that others need is left held or let go.
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
        """Open it; RuntimeError if it cannot be opened any more."""


def new_event() -> threading.Lock:
    """A event that is closed."""
    event = threading.Lock()
    event.acquire()
    return event


def holds(lock: Any) -> bool:
    """Whether this thread has this `threading.RLock`: `threading.Condition` asks it so, too."""
    return bool(lock._is_owned())


def set_event(event: OneShotEvent) -> None:
    """Let who waits on it go on; opening it twice is no error."""
    with contextlib.suppress(RuntimeError):  # it is open
        event.release()


class AsyncOneShotEvent:
    """A event on which a coroutine of the running event loop waits. It is opened from any thread.

    The loop keeps the coroutine that waits, as it does for a timer; the event does not. So a task whose loop is dropped
    can be collected, although its request is still in a queue.
    """

    def __init__(self) -> None:
        self._loop = weakref.ref(asyncio.get_running_loop())
        self._is_open = False
        self._woken: weakref.ref[asyncio.Future[None]] | None = None

    @property
    def is_dead(self) -> bool:
        """Whether the loop was closed or dropped: nobody can go on."""
        loop = self._loop()
        return loop is None or loop.is_closed()

    def release(self) -> None:
        loop = self._loop()
        if loop is not None:
            loop.call_soon_threadsafe(self._open)

    def _open(self) -> None:
        self._is_open = True
        woken = self._woken() if self._woken is not None else None
        if woken is not None:
            _wake(woken)

    async def wait(self, timeout_s: float = math.inf) -> None:
        """Until it is opened, ``timeout_s`` at most; a day at most."""
        if self._is_open:
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
