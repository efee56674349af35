"""Queue for an engine without a manager: one request at a time, in order of arrival."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import ManagerClosed, RequestCancelled

_STATE = "cpu"
"""State of an engine without a manager, which is never moved."""


class QueuedRequest:
    """A request in the queue: a `protocols.Lease`."""

    def __init__(self, queue: SpeechQueue) -> None:
        self._queue = queue
        self.model = queue.model
        self.refusal: Exception | None = None

    @property
    def place(self) -> int | None:
        """0: uses the engine; 1: next in the queue; None: not yet in the queue, or ended."""
        return self._queue.place(self)

    def cancel(self) -> bool:
        """Removes the request from the queue; returns False if it uses the engine, or has ended."""
        return self._queue.refuse(self, RequestCancelled(self.model))


class SpeechQueue:
    """A queue with the part of the manager's interface that `WaitingRequests` needs. Thread-safe."""

    version = 0
    """Constant: the state of the engine does not change, and places are those of the requests."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._changed = threading.Condition()
        self._queue: list[QueuedRequest] = []
        self._closed = False
        self._watch = contextvars.ContextVar[Callable[[Any], object] | None]("watch_queued", default=None)
        self._mine = contextvars.ContextVar("uses_engine", default=False)

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Waits for the engine, and reserves it within this block; nested calls in the same context share it.

        Raises `RequestCancelled`, or `ManagerClosed` after `close`.
        """
        if self._mine.get():
            yield
            return
        request = QueuedRequest(self)
        with self._changed:
            if self._closed:
                raise ManagerClosed
            self._queue.append(request)
        try:
            if watch := self._watch.get():
                watch(request)
            with self._changed:
                self._changed.wait_for(lambda: request.refusal or self._queue[0] is request)
            if request.refusal:
                raise request.refusal
            token = self._mine.set(True)
            try:
                yield
            finally:
                self._mine.reset(token)
        finally:
            with self._changed:
                self._queue.remove(request)
                self._changed.notify_all()

    def close(self) -> None:
        """Refuses waiting and new requests."""
        with self._changed:
            self._closed = True
            waiting = self._queue[1:]
        for request in waiting:
            self.refuse(request, ManagerClosed())

    def place(self, request: QueuedRequest) -> int | None:
        with self._changed:
            return self._queue.index(request) if request in self._queue else None

    def refuse(self, request: QueuedRequest, error: Exception) -> bool:
        """Ends a waiting request with ``error``; returns False if it does not wait any more."""
        with self._changed:
            if request not in self._queue[1:]:
                return False
            request.refusal = request.refusal or error
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

    def status(self) -> Any:
        """Returns the parts of a manager's status that `WaitingRequests` reads."""
        model = {"state": _STATE, "leases": len(self._queue[:1]), "progress": None}
        return {"device": {"kind": "cpu"}, "models": {self.model: model}}
