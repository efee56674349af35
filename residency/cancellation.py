"""Cancellation of a request that runs: an engine asks between its steps whether its result is still wanted::

    from residency.cancellation import checkpoint

    for sentence in sentences:
        checkpoint()                        # raises `RequestStopped` once the request was cancelled
        speech.append(say(sentence))

This is optional: the result of an engine that never asks is dropped at the end. A request runs in a context of its own
(`contextvars`), so engines need no argument for it; threads that an engine starts by itself see a cancellation only if
they are started with a copy of the context.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import RequestStopped


class Cancellation:
    """Whether one request was cancelled; once it was, it stays so. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], object]] = []
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """Let `checkpoint` raise from now on, and call the callbacks of `on_cancel`, in this thread."""
        with self._lock:
            self._cancelled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_cancel(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called once by `cancel`, or now if that was called already. It must not raise."""
        with self._lock:
            if not self._cancelled:
                self._callbacks.append(callback)
                return
        callback()


_current: contextvars.ContextVar[Cancellation | None] = contextvars.ContextVar("current_cancellation", default=None)


def current() -> Cancellation | None:
    """The cancellation of the request in whose context this is called; None outside of one."""
    return _current.get()


def checkpoint() -> None:
    """Raise `RequestStopped` if the request in whose context this is called was cancelled. Cheap."""
    cancellation = _current.get()
    if cancellation is not None and cancellation.cancelled:
        raise RequestStopped


@contextmanager
def cancelled_by(cancellation: Cancellation) -> Iterator[None]:
    """In this block, and in threads that run with a copy of its context, `checkpoint` looks at ``cancellation``."""
    token = _current.set(cancellation)
    try:
        yield
    finally:
        _current.reset(token)
