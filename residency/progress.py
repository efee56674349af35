"""Progress of a move: loaders and residents report it through `current`; status and events show it.

A move runs in its own context (`contextvars`), so loaders and residents need no argument for it::

    progress = current()
    progress.enter("copying", total_bytes)
    progress.advance(nbytes)                # after each storage; from any thread

The first phase has the name of the move's state (``loading``, ``restoring``, ...). Others: ``building`` (the loader
runs), ``looking`` (searches the engine for memory), ``checking`` (compares weights with their mirror), ``copying``
(copies bytes between device and host; on a GPU: queues the copies), ``sessions`` (builds ONNX Runtime sessions),
``reading`` or ``writing`` (a snapshot), ``checkpointing`` or ``resuming`` (a worker process, by the driver). A model
with several parts repeats them.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .locks import renewed_in_children


class Progress:
    """Phase, bytes done and total bytes (None where unknown) of one move. Thread-safe; never raises.

    ``now`` returns the time in seconds. ``changed`` is called after each change, in the thread of the change.
    """

    def __init__(self, phase: str, total_bytes: int | None = None, now: Callable[[], float] = time.monotonic) -> None:
        #: A consistent (phase, bytes done in it, total bytes or None).
        self.facts: tuple[str, int, int | None] = (phase, 0, total_bytes)
        self._now = now
        self._phase_began_s = now()
        self.beats = 0  # steps without bytes
        self.changed: Callable[[], None] | None = None
        self._lock = renewed_in_children(threading.Lock())

    @property
    def pulse(self) -> object:
        """A value that differs after each progress of the move, in bytes or otherwise."""
        return self.facts, self.beats

    @property
    def bytes_per_s(self) -> float | None:
        """Rate since the phase began; None if unknown."""
        with self._lock:
            elapsed_s, done_bytes = self._now() - self._phase_began_s, self.facts[1]
        return done_bytes / elapsed_s if done_bytes and elapsed_s > 0 else None

    def enter(self, phase: str, total_bytes: int | None = None) -> None:
        """Begins a phase of ``total_bytes`` (None: unknown)."""
        with self._lock:
            self.facts = (phase, 0, total_bytes)
            self._phase_began_s = self._now()
        if self.changed is not None:
            self.changed()

    def advance(self, nbytes: int) -> None:
        """Adds bytes done in this phase."""
        with self._lock:
            phase, done_bytes, total_bytes = self.facts
            self.facts = (phase, done_bytes + nbytes, total_bytes)
        if self.changed is not None:
            self.changed()

    def beat(self) -> None:
        """Reports progress without bytes. Cheap; calls no listener."""
        self.beats += 1


_current: contextvars.ContextVar[Progress | None] = contextvars.ContextVar("current_progress", default=None)


def current() -> Progress:
    """Returns the progress of the move in this context; outside of one, a progress that is not shown."""
    return _current.get() or Progress("idle")


@contextmanager
def reporting(progress: Progress) -> Iterator[None]:
    """Makes ``progress`` the `current` one within the block."""
    token = _current.set(progress)
    try:
        yield
    finally:
        _current.reset(token)
