"""The idle monitor: a thread that sleeps until the next deadline; and the search for lost leases.

Decisions and moves are made elsewhere.
"""

from __future__ import annotations

import gc
import logging
import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from ..contracts import Clock
from ..locks import new_event, set_event
from ..observability.error_classification import in_words
from ..status_types import MonitorHealth
from .managed_model import ManagedModel

logger = logging.getLogger(__name__)

PAUSE_AFTER_ERROR_S = 1.0

_REST = 20.0
"""Pause after a garbage collection, as a multiple of its duration, which may be long in a large program."""


class IdleMonitor:
    """Calls ``look`` under the lock at each deadline, which returns the next one, then ``act`` without the lock.

    After a deadline in the past both are called again at once. Errors are logged and shown in the status; the thread
    continues, or the next `expect_locked` starts another. Methods that end in ``_locked`` need ``lock``.
    """

    def __init__(
        self, lock: AbstractContextManager[object], clock: Clock, look: Callable[[], float], act: Callable[[], None]
    ) -> None:
        self._lock = lock
        self._wake_up: threading.Lock | None = None
        self._clock = clock
        self._look = look
        self._act = act
        self._thread: threading.Thread | None = None
        self._turn: object = None
        self._stopping = False
        self._sleeps_until_s = -math.inf
        self._errors = 0
        self._last_error: str | None = None

    @property
    def alive(self) -> bool:
        thread = self._thread
        return thread is not None and thread.is_alive()

    def health(self) -> MonitorHealth:
        return {"alive": self.alive, "errors": self._errors, "last_error": self._last_error}

    def expect_locked(self, deadline_s: float) -> None:
        """Ensures that ``look`` is called at that time; starts the thread if necessary."""
        if deadline_s < self._sleeps_until_s:
            self.wake()
        if not self._stopping and (self._thread is None or not self._thread.is_alive()):
            self.wake()
            self._turn = turn = object()
            self._thread = threading.Thread(target=self._run, args=(turn,), name="gpu-idle-monitor", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # no more threads; the next call tries again
                logger.warning("The idle monitor cannot be started now", exc_info=True)

    def reset_in_child(self) -> None:
        """In a forked child: the thread belongs to the parent."""
        self._stopping, self._thread = True, None

    def stop(self) -> None:
        """Ends the thread and waits for it."""
        with self._lock:
            self._stopping = True
            self.wake()
        thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join()

    def wake(self) -> None:
        """Wakes the thread. Needs no lock."""
        if self._wake_up is not None:
            set_event(self._wake_up)

    def _run(self, turn: object) -> None:
        # An interrupt during the start of a thread can make it seem dead; then its successor has the turn.
        while self._turn is turn and not self._stopping:
            try:
                self._act()
                with self._lock:
                    if self._turn is not turn:
                        return
                    wake_up, sleep_s = self._fall_asleep_locked(self._look)
            except BaseException as error:  # any error: no other thread handles the deadlines
                self._errors += 1
                self._last_error = in_words(error)
                logger.exception("The idle monitor met an error and goes on")
                with self._lock:
                    wake_up, sleep_s = self._fall_asleep_locked(lambda: self._clock.now() + PAUSE_AFTER_ERROR_S)
            if sleep_s > 0:
                self._clock.wait(wake_up, sleep_s)

    def _fall_asleep_locked(self, decide: Callable[[], float]) -> tuple[threading.Lock, float]:
        # The event is created first: a `wake` without the lock either precedes `decide`, or sets the event.
        self._wake_up = wake_up = new_event()
        self._sleeps_until_s = deadline_s = decide()
        return wake_up, 0.0 if self._stopping else deadline_s - self._clock.now()


class LostLeases:
    """Leases that are reachable only from themselves: triggers garbage collections, which end them.

    Python would do so by itself, possibly hours later. Methods that end in ``_locked`` need the dispatcher's lock.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._next_collection_s = -math.inf
        self.suspected = False

    def look_locked(self, managed: ManagedModel, now_s: float) -> None:
        """Checks at intervals whether the code that took a lease still executes; sets ``suspected`` if not."""
        holder = managed.leases.holder
        if holder is None or now_s < holder.search_s:
            return
        holder.searched_s = now_s
        if now_s >= self._next_collection_s and not holder.site.executes():
            self.suspected = True

    def collect(self) -> None:
        """Collects garbage; the leases found end at once or with the next `Dispatcher.run_pending`."""
        self.suspected = False
        began_s = self._clock.now()
        gc.collect()
        self._next_collection_s = self._clock.now() + _REST * (self._clock.now() - began_s)
