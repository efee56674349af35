"""Tracks the leases that sessions wait for: reports their progress, and cancels those of closed connections."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...cancellation import checkpoint, current
from ...errors import RequestCancelled
from ..shared.gradio_compat import localizer, session
from ..shared.protocols import Manager, QueuedLease
from ..speech.queue import SpeechQueue
from . import status_text

ProgressLine = tuple[str, float]
"""A sentence, and the share that is done from 0 to 1 (0: unknown)."""


class WaitingRequests:
    """The leases that sessions wait for. Thread-safe."""

    def __init__(self, manager: Manager | SpeechQueue | None) -> None:
        self._manager = manager
        self._lock = threading.Lock()
        self._leases: dict[str | None, dict[QueuedLease, float]] = {}  # values: start of the wait

    @contextmanager
    def watched(
        self, model: str, ready: tuple[str, str] = status_text.READY
    ) -> Iterator[Callable[[], ProgressLine | None]]:
        """Watches the leases that the current request enters within this block; cancelling it removes them.

        The block's value returns queue position or progress of the model, for any thread; None while unknown.
        ``ready`` is the sentence in Chinese and English once the model works for the request.
        """
        if self._manager is None:
            yield lambda: None
            return
        owner, watched = session(), list[QueuedLease]()

        def watch(lease: QueuedLease) -> None:
            watched.append(lease)
            with self._lock:
                self._leases.setdefault(owner, {})[lease] = time.monotonic()
            if cancellation := current():
                cancellation.on_cancel(lease.cancel)

        try:
            with self._manager.watching(watch):
                yield self._reader(self._manager, model, watched, ready)
        except RequestCancelled:
            checkpoint()  # raises `RequestStopped` if the user stopped the request
            raise
        finally:
            with self._lock:
                for other, leases in list(self._leases.items()):  # `inherit` may have moved them to another session
                    for lease in watched:
                        leases.pop(lease, None)
                    if not leases:
                        del self._leases[other]

    def _reader(
        self, manager: Manager | SpeechQueue, model: str, leases: list[QueuedLease], ready: tuple[str, str]
    ) -> Callable[[], ProgressLine | None]:
        localize = localizer()
        known: tuple[int, int | None] | None = None
        progress: ProgressLine | None = None
        begun: QueuedLease | None = None

        def read() -> ProgressLine | None:
            nonlocal known, progress, begun
            # Not those of other models, which the loader of this one uses.
            latest = next((lease for lease in reversed(leases) if lease.model == model), None)
            place = latest.place if latest else None
            begun = latest if place == 0 else begun
            if latest and latest is begun:  # also after its end
                return localize(*ready), 0.0
            if known != (now := (manager.version, place)):
                known = now
                progress = status_text.progress(manager.status(), model, place, localize, ready) or progress
            return progress

        return read

    def inherit(self, before: str, owner: str) -> None:
        """Transfers the leases of the session ``before`` to ``owner``."""
        with self._lock:
            if leases := self._leases.pop(before, None):
                self._leases.setdefault(owner, {}).update(leases)

    def cancel_waiting(self, owner: str, for_s: float) -> bool:
        """Cancels requests of a session that have waited for ``for_s`` seconds, since its stream closed.

        Running requests continue. Returns True if newer requests wait, whose stream may open soon.
        """
        now_s = time.monotonic()
        with self._lock:
            leases = self._leases.get(owner, {})
            old = [lease for lease, since_s in leases.items() if now_s - since_s >= for_s]
            younger = len(leases) > len(old)
        for lease in old:
            lease.cancel()
        return younger
