"""The idle monitor: a thread that sleeps until the next deadline. It decides nothing and moves nothing itself."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Any

from .contracts import Clock

logger = logging.getLogger(__name__)

PAUSE_AFTER_ERROR_S = 1.0


class Monitor:
    """At each deadline calls ``look`` under the lock, which decides and answers the next deadline, then ``act``.

    A deadline that has come already means: act, and look again. An error in there is kept for the status and logged,
    and the thread goes on; should it end all the same, the next `expect_locked` starts another. Methods that end in
    ``_locked`` want the lock of ``wake``.
    """

    def __init__(self, wake: threading.Condition, clock: Clock, look: Callable[[], float], act: Callable[[], None]):
        self._wake = wake
        self._clock = clock
        self._look = look
        self._act = act
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._sleeps_until_s = -math.inf
        self._errors = 0
        self._last_error: str | None = None

    def health(self) -> dict[str, Any]:
        """Whether the thread lives, and how often something went wrong in it."""
        thread = self._thread
        return {
            "alive": thread is not None and thread.is_alive(),
            "errors": self._errors,
            "last_error": self._last_error,
        }

    def expect_locked(self, deadline_s: float) -> None:
        """Be there at that time: wakes the thread only if it would sleep longer."""
        if deadline_s < self._sleeps_until_s:
            self._wake.notify_all()
        if deadline_s < math.inf and not self._stopping and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._run, name="gpu-idle-monitor", daemon=True)
            self._thread.start()

    def leave(self) -> None:
        """For a forked child: the thread is the parent's."""
        self._stopping, self._thread = True, None
        self._wake = threading.Condition()

    def stop(self) -> None:
        """End the thread and wait for it."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._act()
                with self._wake:
                    self._sleep_until_locked(self._look())
            except Exception as error:
                self._errors += 1
                self._last_error = f"{type(error).__name__}: {error}"
                logger.exception("The idle monitor met an error and goes on")
                with self._wake:
                    self._sleep_until_locked(self._clock.now() + PAUSE_AFTER_ERROR_S)

    def _sleep_until_locked(self, deadline_s: float) -> None:
        sleep_s = deadline_s - self._clock.now()
        if sleep_s > 0 and not self._stopping:
            self._sleeps_until_s = deadline_s
            try:
                self._clock.wait(self._wake, sleep_s)
            finally:
                self._sleeps_until_s = -math.inf
