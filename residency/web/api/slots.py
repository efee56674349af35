"""Limits the requests of the speech API that wait or run at the same time."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .openai_errors import TooManyRequests


class Slots:
    """At most ``most`` requests at a time. Thread-safe."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._taken = 0
        self._mean_s = 1.0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Counts a request within this block; raises `TooManyRequests` if there are too many."""
        with self._lock:
            if self._taken >= self.most:
                raise TooManyRequests(self.most, min(60, max(1, math.ceil(self._mean_s))))
            self._taken += 1
        began_s = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._taken -= 1
                self._mean_s += (time.monotonic() - began_s - self._mean_s) / 8
