"""The queue before an engine that no manager looks after: one request at a time, in order of arrival."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...errors import ManagerClosed, RequestCancelled

_STATE = "cpu"
"""Such an engine is where it was built, for good."""


class QueuedRequest:
    """One request in the queue: a `protocols.Lease`."""

    def __init__(self, turns: SpeechQueue) -> None:
        self._turns = turns
        self.model = turns.model
        self.refusal: Exception | None = None

    @property
    def place(self) -> int | None:
        """0: has the engine; 1: served next; None: ended."""
        return self._turns.place(self)

    def cancel(self) -> bool:
        """Take it out of the queue; False if it has the engine, or has ended."""
        return self._turns.refuse(self, RequestCancelled(self.model))


@dataclass(frozen=True)
class QueueChanged:
    """The part of a manager's `Event` that tells of its queue."""

    model: str
    what: str = "queue"
    source: str = _STATE


class SpeechQueue:
    """Has what `Waiting` needs of a manager: ``status``, ``subscribe`` and ``watching``. Thread-safe."""

    version = 0
    """As of a manager whose status never has anything new to tell: what happens here is told to listeners."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._changed = threading.Condition()
        self._queue: list[QueuedRequest] = []
        self._closed = False
        self._listeners: tuple[Callable[[Any], Any], ...] = ()
        self._watch = contextvars.ContextVar[Callable[[Any], object] | None]("watch_turns", default=None)
        self._mine = contextvars.ContextVar("has_turn", default=False)

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for a turn, which lasts until the block ends. `RequestCancelled`; `ManagerClosed` after `close`.

        A nested request of the same context shares the turn.
        """
        if self._mine.get():
            yield
            return
        turn = QueuedRequest(self)
        with self._changed:
            if self._closed:
                raise ManagerClosed
            self._queue.append(turn)
        try:
            if watch := self._watch.get():
                watch(turn)
            self._tell()
            with self._changed:
                self._changed.wait_for(lambda: turn.refusal or self._queue[0] is turn)
            if turn.refusal:
                raise turn.refusal
            token = self._mine.set(True)
            try:
                yield
            finally:
                self._mine.reset(token)
        finally:
            with self._changed:
                self._queue.remove(turn)
                self._changed.notify_all()
            self._tell()

    def close(self) -> None:
        """Refuse those that wait, and those that come."""
        with self._changed:
            self._closed = True
            waiting = self._queue[1:]
        for turn in waiting:
            self.refuse(turn, ManagerClosed())

    def place(self, turn: QueuedRequest) -> int | None:
        with self._changed:
            return self._queue.index(turn) if turn in self._queue else None

    def refuse(self, turn: QueuedRequest, error: Exception) -> bool:
        """Let a turn that waits raise ``error``; False if it waits no more."""
        with self._changed:
            if turn not in self._queue[1:]:
                return False
            turn.refusal = turn.refusal or error
            self._changed.notify_all()
        return True

    @contextmanager
    def watching(self, watch: Callable[[Any], object]) -> Iterator[None]:
        """A block in which ``watch`` sees each turn before it waits."""
        token = self._watch.set(watch)
        try:
            yield
        finally:
            self._watch.reset(token)

    def subscribe(self, listener: Callable[[Any], Any]) -> Callable[[], None]:
        """Have each `QueueChanged` told to ``listener``, in the thread that makes it; call the answer to end that."""
        with self._changed:
            self._listeners += (listener,)

        def unsubscribe() -> None:
            with self._changed:
                self._listeners = tuple(each for each in self._listeners if each is not listener)

        return unsubscribe

    def status(self) -> dict[str, Any]:
        """The parts of a manager's status from which a request begins to tell."""
        return {"device": {"kind": "cpu"}, "models": {self.model: {"state": _STATE, "leases": len(self._queue[:1])}}}

    def _tell(self) -> None:
        for listener in self._listeners:
            listener(QueueChanged(self.model))
