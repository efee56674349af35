"""Shows queue position and model progress to users who wait for a result.

In ``gradio_client``, ``job.status()`` has the same information. Requests of closed connections are cancelled.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from ...cancellation import checkpoint, current
from ...errors import RequestCancelled
from ...states import State
from ..shared.gradio_compat import localizer, session
from ..shared.protocols import Lease, Manager
from ..speech.queue import SpeechQueue
from . import status_text

Tell = Callable[[float, str], object]
"""Callback for progress: the share that is done (0 to 1; 0 if unknown) and a sentence."""


class WaitMessages:
    """The leases that sessions wait for. Thread-safe."""

    def __init__(self, manager: Manager | SpeechQueue | None) -> None:
        self._manager = manager
        self._lock = threading.Lock()
        self._leases: dict[str | None, dict[Lease, float]] = {}  # values: start of the wait

    @contextmanager
    def told(
        self, model: str | None, tell: Tell | None = None, ready: tuple[str, str] = status_text.READY
    ) -> Iterator[Callable[[], None]]:
        """Reports queue position and model progress to the user of the current event within this block.

        Uses ``tell``, by default Gradio's progress; ``ready`` is the message in Chinese and English when the model
        starts work. Events are rate-limited: the block's value is a function that polls the model for the progress
        between them. Cancelling the request removes it from the queue.
        """
        if self._manager is None or model is None:
            yield lambda: None
            return
        teller, whose, mine = _Teller(self._manager, model, tell, ready), session(), list[Lease]()

        def watch(lease: Lease) -> None:
            mine.append(lease)
            if lease.model == model:  # not another model's, which its loader uses
                teller.lease = lease
            with self._lock:
                self._leases.setdefault(whose, {})[lease] = time.monotonic()
            if cancellation := current():
                cancellation.on_cancel(lease.cancel)

        unsubscribe = self._manager.subscribe(teller.listen)
        try:
            teller.begin()
            with self._manager.watching(watch):
                yield teller.look
        except RequestCancelled:
            checkpoint()  # raises `RequestStopped` if the user stopped the request
            raise
        finally:
            unsubscribe()
            with self._lock:
                for who, leases in list(self._leases.items()):  # `inherit` may have moved them to another session
                    for lease in mine:
                        leases.pop(lease, None)
                    if not leases:
                        del self._leases[who]

    def inherit(self, before: str, whose: str) -> None:
        """Transfers the leases of the session ``before`` to ``whose``."""
        with self._lock:
            if leases := self._leases.pop(before, None):
                self._leases.setdefault(whose, {}).update(leases)

    def gone(self, whose: str, for_s: float) -> bool:
        """Cancels requests of a session that have waited for ``for_s`` seconds, since its stream closed.

        Running requests continue. Returns True if newer requests wait, whose stream may open soon.
        """
        now_s = time.monotonic()
        with self._lock:
            leases = self._leases.get(whose, {})
            old = [lease for lease, since_s in leases.items() if now_s - since_s >= for_s]
            younger = len(leases) > len(old)
        for lease in old:
            lease.cancel()
        return younger


class _Teller:
    """Progress reports of one request to its user."""

    def __init__(self, manager: Manager | SpeechQueue, model: str, tell: Tell | None, ready: tuple[str, str]) -> None:
        self._model, self._speak = model, localizer()
        self._ready = ready
        self._tell = tell or self._gradios_own()
        self._manager, self._seen = manager, manager.version
        status: Any = manager.status()
        self._kind, self._present = status["device"]["kind"], status["models"].get(model, {})
        self._there = State.DEVICE.shown(self._kind)
        self.lease: Lease | None = None
        self._said: tuple[str, float] | None = None

    def begin(self) -> None:
        if way := self._present.get("progress"):
            self._say_way(way["to"], way["phase"], way["bytes"], way["total_bytes"], way["bytes_per_s"])
        elif self._present.get("leases"):
            self._say(status_text.in_use(self._speak))
        elif self._present.get("state") == self._there:
            self._say(self._speak(*self._ready))

    def look(self) -> None:
        if self._seen == (version := self._manager.version):
            return
        self._seen = version
        status: Any = self._manager.status()
        way = status["models"].get(self._model, {}).get("progress")
        place = self.lease.place if self.lease else None
        if way and place is not None and place <= 1:
            self._say_way(way["to"], way["phase"], way["bytes"], way["total_bytes"], way["bytes_per_s"])

    def listen(self, event: Any) -> None:
        if event.model != self._model:
            return
        place = self.lease.place if self.lease else None
        if place is not None and place > 1:
            self._say(status_text.queued(place, self._speak))
        elif event.what in ("began", "progress"):
            self._say_way(event.target, event.phase, event.done_bytes, event.total_bytes, event.bytes_per_s)
        elif event.what == "done" and (
            arrival := status_text.arrived(self._kind, event.target, self._speak, self._ready)
        ):
            self._say(arrival)
        elif event.what == "queue" and event.source == self._there and place is not None:
            self._say(status_text.in_use(self._speak) if place else self._speak(*self._ready))

    def _say(self, sentence: str, share: float = 0.0) -> None:
        if (sentence, share) != self._said:
            self._said = sentence, share
            self._tell(share, sentence)

    def _gradios_own(self) -> Tell:
        context, progress = contextvars.copy_context(), gr.Progress()

        def tell(share: float, sentence: str) -> None:
            # Gradio finds the event by the context; a copy, since two threads cannot enter the same one.
            context.copy().run(progress, share, desc=sentence)

        return tell

    def _say_way(
        self, target: str, phase: str, done_bytes: int, total_bytes: int | None, bytes_per_s: float | None
    ) -> None:
        sentence = status_text.on_its_way(self._kind, target, phase, done_bytes, total_bytes, bytes_per_s, self._speak)
        self._say(sentence, status_text.share(done_bytes, total_bytes) or 0.0)
