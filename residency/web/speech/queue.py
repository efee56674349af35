"""Queue for an engine without a manager: one request at a time, in order of arrival."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...errors import ManagerClosed, RequestCancelled

_STATE = "cpu"
"""State of an engine without a manager, which is never moved."""


class QueuedRequest:
    """A request in the queue: a `protocols.Lease`."""

    def __init__(self, turns: SpeechQueue) -> None:
        self._turns = turns
        self.model = turns.model
        self.refusal: Exception | None = None

    @property
    def place(self) -> int | None:
        """0: uses the engine; 1: next in the queue; None: ended."""
        return self._turns.place(self)

    def cancel(self) -> bool:
        """Removes the request from the queue; returns False if it uses the engine, or has ended."""
        return self._turns.refuse(self, RequestCancelled(self.model))


@dataclass(frozen=True)
class QueueChanged:
    """A change of the queue: the subset of a manager's `Event` for it."""

    model: str
    what: str = "queue"
    source: str = _STATE


class SpeechQueue:
    """A queue with the part of the manager's interface that `WaitMessages` needs. Thread-safe."""

    version = 0
    """Constant, since listeners receive all changes."""

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
        """Waits for the engine, and reserves it within this block; nested calls in the same context share it.

        Raises `RequestCancelled`, or `ManagerClosed` after `close`.
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
        """Refuses waiting and new requests."""
        with self._changed:
            self._closed = True
            waiting = self._queue[1:]
        for turn in waiting:
            self.refuse(turn, ManagerClosed())

    def place(self, turn: QueuedRequest) -> int | None:
        with self._changed:
            return self._queue.index(turn) if turn in self._queue else None

    def refuse(self, turn: QueuedRequest, error: Exception) -> bool:
        """Ends a waiting request with ``error``; returns False if it does not wait any more."""
        with self._changed:
            if turn not in self._queue[1:]:
                return False
            turn.refusal = turn.refusal or error
            self._changed.notify_all()
        return True

    @contextmanager
    def watching(self, watch: Callable[[Any], object]) -> Iterator[None]:
        """Calls ``watch`` with each request within this block, before it waits."""
        token = self._watch.set(watch)
        try:
            yield
        finally:
            self._watch.reset(token)

    def subscribe(self, listener: Callable[[Any], Any]) -> Callable[[], None]:
        """Calls ``listener`` with each `QueueChanged`, in the causing thread; returns a function that unsubscribes."""
        with self._changed:
            self._listeners += (listener,)

        def unsubscribe() -> None:
            with self._changed:
                self._listeners = tuple(each for each in self._listeners if each is not listener)

        return unsubscribe

    def status(self) -> dict[str, Any]:
        """Returns the parts of a manager's status that `WaitMessages` reads."""
        return {"device": {"kind": "cpu"}, "models": {self.model: {"state": _STATE, "leases": len(self._queue[:1])}}}

    def _tell(self) -> None:
        for listener in self._listeners:
            listener(QueueChanged(self.model))
