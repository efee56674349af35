"""Progress of a move: loaders and residents report it through `current`; the status and events show it.

A move runs in a context of its own (`contextvars`), so loaders and residents need no argument for it::

    progress = current()
    progress.enter("copying", total_bytes)
    progress.advance(nbytes)                # after each piece; from any thread that was given the object

A move begins in the phase that is its state's name (``loading``, ``restoring``, ...), and may then be: ``building`` (a
loader runs), ``looking`` (an engine is searched for memory), ``checking`` (weights are compared with their mirror),
``copying`` (bytes cross between device and host; on a GPU: are queued to), ``sessions`` (ONNX Runtime builds),
``reading`` or ``writing`` (a snapshot). A model with several parts goes through them more than once.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .locks import renewed_in_children


class Progress:
    """Phase, bytes done and bytes in all (None where unknown) of one move. Thread-safe; never raises.

    ``now`` tells the time in seconds. ``changed`` is called after each change, in the thread that made it.
    """

    def __init__(self, phase: str, total_bytes: int | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._facts = (phase, 0, total_bytes)
        self._now = now
        self._phase_began_s = now()
        self.beats = 0
        """A counter of steps without bytes."""
        self.changed: Callable[[], None] | None = None
        self._lock = renewed_in_children(threading.Lock())

    @property
    def facts(self) -> tuple[str, int, int | None]:
        """(phase, bytes done in it, bytes in all or None), of one moment."""
        return self._facts

    @property
    def pulse(self) -> object:
        """Another value whenever the move has made progress, in bytes or otherwise."""
        return self._facts, self.beats

    @property
    def bytes_per_s(self) -> float | None:
        """Rate of the phase since it began; None if unknown."""
        with self._lock:
            elapsed_s, done_bytes = self._now() - self._phase_began_s, self._facts[1]
        return done_bytes / elapsed_s if done_bytes and elapsed_s > 0 else None

    def enter(self, phase: str, total_bytes: int | None = None) -> None:
        """Begin a phase of ``total_bytes`` (None: unknown), of which nothing is done yet."""
        with self._lock:
            self._facts = (phase, 0, total_bytes)
            self._phase_began_s = self._now()
        self._tell()

    def advance(self, nbytes: int) -> None:
        """Add bytes that were done in this phase."""
        with self._lock:
            phase, done_bytes, total_bytes = self._facts
            self._facts = (phase, done_bytes + nbytes, total_bytes)
        self._tell()

    def beat(self) -> None:
        """Report that the phase goes on without bytes. Cheap; calls no listener."""
        self.beats += 1

    def _tell(self) -> None:
        if self.changed is not None:
            self.changed()


_current: contextvars.ContextVar[Progress | None] = contextvars.ContextVar("current_progress", default=None)


def current() -> Progress:
    """The progress of the move in whose context this is called; outside of one, a progress that is not shown."""
    return _current.get() or Progress("idle")


@contextmanager
def reporting(progress: Progress) -> Iterator[None]:
    """What is moved within this block is ``progress``'s."""
    token = _current.set(progress)
    try:
        yield
    finally:
        _current.reset(token)
