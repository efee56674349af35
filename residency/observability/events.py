"""Events of the models, for listeners: the page, the API, programs."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Literal

from ..locks import new_event, renewed_in_children, set_event
from ..states import ShownState
from ..status_types import Doc

logger = logging.getLogger(__name__)

DELIVERY_WITHIN_S = 5.0
"""Maximum wait of `close` for the delivery of remaining events."""

_BACKLOG, _BACKLOG_AT_MOST = 1000, 100_000

What = Literal["began", "progress", "done", "failed", "queue"]


@dataclass(frozen=True)
class Event:
    """A move or a change of the queue of one model. Sizes in bytes, times in seconds of the manager's clock."""

    what: Annotated[What, Doc("`queue`: the queue has changed; the others are stages of a move.")]
    model: Annotated[str, Doc("The model's name.")]
    source: Annotated[ShownState, Doc("Where the move began; without a move, where the model is.")]
    target: Annotated[ShownState, Doc("Where it leads; without a move, where the model is.")]
    time_s: Annotated[float, Doc("When, by a clock that only this process knows: use differences.")]
    waiting: Annotated[int, Doc("Requests that wait for the model.")]
    seconds: Annotated[float, Doc("Seconds since the move began.")] = 0.0
    phase: Annotated[str, Doc("The step of the move: loading, copying, reading, ...; empty without a move.")] = ""
    done_bytes: Annotated[int, Doc("Bytes done in this phase.")] = 0
    total_bytes: Annotated[int | None, Doc("All bytes of this phase; null if unknown.")] = None
    bytes_per_s: Annotated[float | None, Doc("The rate of this phase, in bytes per second; null if unknown.")] = None
    error: Annotated[str | None, Doc("Why the move failed; null if it did not.")] = None


class Subscribers:
    """The listeners for events. Thread-safe.

    They are called one after the other in a separate thread, in order of the events; moves and requests do not wait for
    them. An error of a listener is logged; it stays subscribed. For slow listeners, progress events are dropped; if one
    does not return, the oldest of more than `_BACKLOG_AT_MOST` events are dropped.
    """

    def __init__(self) -> None:
        self._listeners: tuple[Callable[[Event], object], ...] = ()
        self._events: deque[Event] = deque(maxlen=_BACKLOG_AT_MOST)
        self._wake_up = new_event()
        self._lock = renewed_in_children(threading.Lock())  # protects changes of the listeners
        self._thread: threading.Thread | None = None
        self._closed = False

    def subscribe(self, listener: Callable[[Event], object]) -> Callable[[], None]:
        """Calls ``listener`` from now on; returns a function that unsubscribes it."""
        with self._lock:
            self._listeners = (*self._listeners, listener)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="gpu-events", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads; the next subscription tries again
                    logger.warning("The thread for events cannot be started now", exc_info=True)
                else:
                    self._thread = thread

        def unsubscribe() -> None:
            with self._lock:
                self._listeners = tuple(other for other in self._listeners if other is not listener)

        return unsubscribe

    def __bool__(self) -> bool:
        return bool(self._listeners)

    def publish(self, event: Event) -> None:
        """Adds an event and returns at once. May be called under any lock."""
        if self._listeners and not (event.what == "progress" and len(self._events) > _BACKLOG):
            self._events.append(event)
            set_event(self._wake_up)

    def close(self) -> None:
        """Ends the thread after the delivery of all events, but waits at most `DELIVERY_WITHIN_S` for a listener."""
        self._closed = True
        set_event(self._wake_up)
        thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(DELIVERY_WITHIN_S)

    def reset_in_child(self) -> None:
        """In a forked child: the listeners belong to the parent."""
        self._listeners, self._thread = (), None
        self._events.clear()

    def _run(self) -> None:
        while True:
            self._wake_up = wake_up = new_event()
            while self._events:
                event = self._events.popleft()
                for listener in self._listeners:
                    try:
                        listener(event)
                    except BaseException:  # any error: the other listeners must be called
                        with suppress(Exception):
                            logger.exception("A listener failed at %s", event)
            if self._closed:
                return
            wake_up.acquire()
