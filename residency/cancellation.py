"""Cancellation of a running request: an engine calls `checkpoint` between its steps::

    from residency.cancellation import checkpoint

    for sentence in sentences:
        checkpoint()                        # raises `RequestStopped` once the request was cancelled
        speech.append(say(sentence))

This is optional: otherwise the result of a cancelled request is dropped at its end. A request runs in its own context
(`contextvars`), so engines need no argument for it; threads that an engine starts need a copy of the context.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .errors import RequestStopped


class Cancellation:
    """The cancelled flag of one request; never reset. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], object]] = []
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Sets the flag, so that `checkpoint` raises, and runs the callbacks of `on_cancel` in this thread."""
        with self._lock:
            self._cancelled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_cancel(self, callback: Callable[[], object]) -> None:
        """Calls ``callback`` once: at `cancel`, or now if already cancelled. It must not raise."""
        with self._lock:
            if not self._cancelled:
                self._callbacks.append(callback)
                return
        callback()

    @contextmanager
    def calling(self, callback: Callable[[], object]) -> Iterator[None]:
        """Like `on_cancel`, within the block only."""
        self.on_cancel(callback)
        try:
            yield
        finally:
            with self._lock, suppress(ValueError):  # it was called
                self._callbacks.remove(callback)


_current: contextvars.ContextVar[Cancellation | None] = contextvars.ContextVar("current_cancellation", default=None)


def current() -> Cancellation | None:
    """Returns the cancellation of the request in this context; None outside of one."""
    return _current.get()


def checkpoint() -> None:
    """Raises `RequestStopped` if the request in this context was cancelled. Cheap."""
    cancellation = _current.get()
    if cancellation is not None and cancellation.cancelled:
        raise RequestStopped


@contextmanager
def cancelled_by(cancellation: Cancellation) -> Iterator[None]:
    """Makes `checkpoint` use ``cancellation`` within the block and in threads started with a copy of its context."""
    token = _current.set(cancellation)
    try:
        yield
    finally:
        _current.reset(token)
