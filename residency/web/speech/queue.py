"""Queue for an engine without a manager: a fixed number of requests at a time, in order of arrival."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import ManagerClosed, RequestCancelled
from ...receipts import Receipt

_STATE = "cpu"
"""State of an engine without a manager, which is never moved."""
_watch = contextvars.ContextVar[Callable[[Any], object] | None]("watch_queued", default=None)


class QueuedRequest:
    """A request in the queue: a `protocols.QueuedLease`."""

    def __init__(self, queue: SpeechQueue) -> None:
        self._queue = queue
        self.model = queue.model
        self.refusal: Exception | None = None
        self.ended = False
        self.queued: Callable[[], object] | None = None
        """Like `Lease.queued`: called once the request is in the queue."""
        self.receipt: Receipt | None = None
        """Like `Lease.receipt`."""

    @property
    def place(self) -> int | None:
        """0: uses the engine; 1: next in the queue; None: not yet in the queue, or ended."""
        with self._queue.changed:
            requests = self._queue.requests
            return max(0, requests.index(self) - self._queue.at_once + 1) if self in requests else None

    def cancel(self, error: Exception | None = None) -> bool:
        """Ends a waiting request with ``error``; returns False if it uses the engine, or has ended."""
        with self._queue.changed:
            if self.ended or self in self._queue.requests[: self._queue.at_once]:
                return False
            self.refusal = self.refusal or error or RequestCancelled(self.model)
            self._queue.changed.notify_all()
        return True


class SpeechQueue:
    """A queue with the part of the manager's interface that `WaitingRequests` needs. Thread-safe."""

    version = 0
    """Constant: the state of the engine does not change, and places are those of the requests."""

    def __init__(self, model: str, at_once: int = 1) -> None:
        """``at_once``: number of requests that use the engine at a time."""
        self.model = model
        self.at_once = at_once
        self.changed = threading.Condition()
        self.requests: list[QueuedRequest] = []
        self._closed = False
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
        if watch := _watch.get():
            watch(request)
        began_s = time.monotonic()
        with self.changed:
            if self._closed:
                raise ManagerClosed
            self.requests.append(request)
        try:
            if request.queued:
                request.queued()
            with self.changed:
                self.changed.wait_for(lambda: request.refusal or request in self.requests[: self.at_once])
            if request.refusal:
                raise request.refusal
            request.receipt = Receipt.of((time.monotonic() - began_s, None, 0.0))
            token = self._mine.set(True)
            try:
                yield
            finally:
                self._mine.reset(token)
        finally:
            with self.changed:
                request.ended = True
                self.requests.remove(request)
                self.changed.notify_all()

    def close(self) -> None:
        """Refuses waiting and new requests."""
        with self.changed:
            self._closed = True
            waiting = self.requests[self.at_once :]
        for request in waiting:
            request.cancel(ManagerClosed())

    @contextmanager
    def watching(self, watch: Callable[[Any], object]) -> Iterator[None]:
        """Calls ``watch`` with each request, of any queue, within this block, before it waits."""
        token = _watch.set(watch)
        try:
            yield
        finally:
            _watch.reset(token)

    def status(self) -> Any:
        """Returns the parts of a manager's status that `WaitingRequests` reads."""
        model = {"state": _STATE, "leases": len(self.requests[: self.at_once]), "progress": None}
        return {"device": {"kind": "cpu"}, "models": {self.model: model}}
