"""What happens to the models, told to whoever listens: the page, the API, programs."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from ..locks import renewed_in_children
from ..one_shot_event import new_event, set_event

logger = logging.getLogger(__name__)

TOLD_WITHIN_S = 5.0
"""How long the end waits at most for what listeners are still to be told."""

_BACKLOG, _BACKLOG_AT_MOST = 1000, 100_000

What = Literal["began", "progress", "done", "failed", "queue"]


@dataclass(frozen=True)
class Event:
    """One thing that happened to one model. Times in seconds of the manager's clock, sizes in bytes.

    ``waiting`` requests are in its queue. ``queue`` tells of changes of that; the others tell of a move: ``seconds``
    since it began, and ``phase``, ``done_bytes``, ``total_bytes`` and ``bytes_per_s`` (None: unknown), which say how
    far it has come in its phase, and how fast; see `residency.progress`. ``source`` and ``target`` are states as people
    see them (``gpu``, ``cpu``, ``released``, ``moving``); without a move, the one that the model is in.
    """

    what: What
    model: str
    source: str
    target: str
    time_s: float
    waiting: int
    seconds: float = 0.0
    phase: str = ""
    done_bytes: int = 0
    total_bytes: int | None = None
    bytes_per_s: float | None = None
    error: str | None = None


class Subscribers:
    """Who wants to know. Any thread may subscribe, and tell, at any time.

    They are called one after the other in a thread of their own, in the order in which things happened; no move and
    no request waits for them. One that raises is logged and stays subscribed. For one that is too slow, progress is
    left out; for one that does not return at all, what is `_BACKLOG_AT_MOST` events old.
    """

    def __init__(self) -> None:
        self._listeners: tuple[Callable[[Event], Any], ...] = ()
        self._events: deque[Event] = deque(maxlen=_BACKLOG_AT_MOST)
        self._wake_up = new_event()
        self._lock = renewed_in_children(threading.Lock())  # for changes of the listeners
        self._thread: threading.Thread | None = None
        self._closed = False

    def subscribe(self, listener: Callable[[Event], Any]) -> Callable[[], None]:
        """Have ``listener`` called from now on; call the answer to end that."""
        with self._lock:
            self._listeners = (*self._listeners, listener)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="gpu-events", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system gives no more threads: the next listener tries again
                    logger.warning("Events are not told for now", exc_info=True)
                else:
                    self._thread = thread

        def unsubscribe() -> None:
            with self._lock:
                self._listeners = tuple(other for other in self._listeners if other is not listener)

        return unsubscribe

    def __bool__(self) -> bool:
        return bool(self._listeners)

    def tell(self, event: Event) -> None:
        """Returns at once. May be called under any lock."""
        if self._listeners and not (event.what == "progress" and len(self._events) > _BACKLOG):
            self._events.append(event)
            set_event(self._wake_up)

    def close(self) -> None:
        """End, once everything was told; a listener that does not return is left alone after `TOLD_WITHIN_S`."""
        self._closed = True
        set_event(self._wake_up)
        thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(TOLD_WITHIN_S)

    def leave(self) -> None:
        """For a forked child: whoever listens is the parent's."""
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
                    except BaseException:  # whatever it is, the others are told
                        with suppress(Exception):
                            logger.exception("A listener failed at %s", event)
            if self._closed:
                return
            wake_up.acquire()
