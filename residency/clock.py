"""Time, injected: the system's monotonic clock, and one that tests turn by hand."""

from __future__ import annotations

import math
import threading
import time


class SystemClock:
    """``time.monotonic``: unmoved by changes of the wall clock."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, condition: threading.Condition, timeout_s: float | None) -> None:
        if timeout_s is None or timeout_s == math.inf:
            condition.wait()
        else:
            condition.wait(min(max(timeout_s, 0.0), threading.TIMEOUT_MAX))


class ManualClock:
    """A clock that moves only when told to, for tests that must not sleep."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self._now_s = now_s
        self._waiting: dict[threading.Condition, int] = {}
        self._lock = threading.Lock()

    def now(self) -> float:
        return self._now_s

    def wait(self, condition: threading.Condition, timeout_s: float | None) -> None:
        with self._lock:
            self._waiting[condition] = self._waiting.get(condition, 0) + 1
        try:
            condition.wait()
        finally:
            with self._lock:
                self._waiting[condition] -= 1
                if not self._waiting[condition]:
                    del self._waiting[condition]

    def advance(self, seconds: float) -> None:
        """Move time forward and wake everyone who waits on this clock, to look at it again."""
        with self._lock:
            self._now_s += seconds
            waiting = list(self._waiting)
        for condition in waiting:
            with condition:
                condition.notify_all()
