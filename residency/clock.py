"""Clocks, injected: the system's monotonic clock, and one for tests."""

from __future__ import annotations

import math
import threading
import time

from .locks import set_event


class SystemClock:
    """The clock of ``time.monotonic``."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, event: threading.Lock, timeout_s: float = math.inf) -> None:
        event.acquire(timeout=-1 if timeout_s == math.inf else min(max(timeout_s, 0.0), threading.TIMEOUT_MAX))


class ManualClock:
    """A test clock that changes only in `advance`."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self._now_s = now_s
        self._waiting: list[threading.Lock] = []
        self._lock = threading.Lock()
        self._seen = threading.local()

    def now(self) -> float:
        now_s = self._seen.now_s = self._now_s
        return now_s

    def wait(self, event: threading.Lock, timeout_s: float = math.inf) -> None:
        with self._lock:
            seen_s, self._seen.now_s = getattr(self._seen, "now_s", self._now_s), self._now_s
            if seen_s != self._now_s:
                return  # it was advanced between this thread's last `now` and its wait
            self._waiting.append(event)
        event.acquire()
        with self._lock:
            self._waiting.remove(event)

    def advance(self, seconds: float) -> None:
        """Adds seconds and wakes all threads that wait on this clock, which then check it again."""
        with self._lock:
            self._now_s += seconds
            for event in self._waiting:
                set_event(event)
