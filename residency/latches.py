"""A latch: a thread or a coroutine waits on it until a thread opens it, once.

A bare lock that is held until it is opened. Unlike a `threading.Condition`, whose methods are Python code, it survives
an interrupt (Ctrl-C) of the waiting thread at any moment: nothing that others need is left held or let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from typing import Any, Protocol


class Latch(Protocol):
    """`threading.Lock`, or `LoopLatch`."""

    def release(self) -> object:
        """Open it; RuntimeError if it cannot be opened any more."""


def new_latch() -> threading.Lock:
    """A latch that is closed."""
    latch = threading.Lock()
    latch.acquire()
    return latch


def holds(lock: Any) -> bool:
    """Whether this thread has this `threading.RLock`: `threading.Condition` asks it so, too."""
    return bool(lock._is_owned())


def open_latch(latch: Latch) -> None:
    """Let who waits on it go on; opening it twice is no error."""
    with contextlib.suppress(RuntimeError):  # it is open
        latch.release()


class LoopLatch:
    """A latch on which a coroutine of the running event loop waits. It is opened from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._opened = self._loop.create_future()

    def release(self) -> None:
        self._loop.call_soon_threadsafe(self._open)

    def _open(self) -> None:
        if not self._opened.done():
            self._opened.set_result(None)

    async def wait(self, timeout_s: float = math.inf) -> None:
        """Until it is opened, ``timeout_s`` at most."""
        await asyncio.wait((self._opened,), timeout=None if timeout_s == math.inf else max(0.0, timeout_s))
