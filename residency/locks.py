"""Locks that survive a fork, and one-shot events: a thread or a coroutine waits until a thread sets the event, once.

A thread's event is a bare lock, held until it is set. Unlike a `threading.Condition`, whose methods are Python code, it
survives an interrupt (Ctrl-C) of the waiting thread at any moment: no lock stays held or is released too early.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import weakref
from typing import Any, Protocol, TypeVar

L = TypeVar("L")

_LONGEST_WAIT_S = 86400.0

_renewed: weakref.WeakSet[Any] = weakref.WeakSet()


def renewed_in_children(lock: L) -> L:
    """Releases a `threading.Lock` or `RLock` in each forked child, where threads that held it do not exist."""
    _renewed.add(lock)
    return lock


def _renew() -> None:
    for lock in list(_renewed):
        lock._at_fork_reinit()  # as `threading`, `logging` and `concurrent.futures` do with theirs


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def owned_by_this_thread(lock: Any) -> bool:
    """Returns whether this thread owns a `threading.RLock`, with the method that `threading.Condition` uses."""
    return bool(lock._is_owned())


class OneShotEvent(Protocol):
    """`threading.Lock`, or `AsyncOneShotEvent`."""

    def release(self) -> object:
        """Sets it; raises RuntimeError if it is set."""


def new_event() -> threading.Lock:
    """Returns an event that is not set."""
    event = threading.Lock()
    event.acquire()
    return event


def set_event(event: OneShotEvent) -> None:
    """Wakes the thread or coroutine that waits for the event. Does nothing if it is already set."""
    with contextlib.suppress(RuntimeError):  # already set
        event.release()


class AsyncOneShotEvent:
    """An event on which a coroutine of the running event loop waits. Any thread may set it.

    The loop, not the event, keeps the waiting coroutine, as for a timer. So a task whose loop was dropped can be
    collected even while its request is in a queue.
    """

    def __init__(self) -> None:
        self._loop = weakref.ref(asyncio.get_running_loop())
        self._is_set = False
        self._woken: weakref.ref[asyncio.Future[None]] | None = None

    @property
    def is_dead(self) -> bool:
        """Whether the loop was closed or dropped, so that the coroutine cannot continue."""
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
        """Waits until it is set, at most ``timeout_s`` and at most a day."""
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
