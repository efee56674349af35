"""Who waits for an answer reads why, in Gradio's own line of progress: the place in the queue, and what the model does.

Programs read the same in ``job.status()`` of ``gradio_client``. Who has gone waits for nothing.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from . import words
from .compat import session, speaker
from .protocols import Lease, Manager


class Waiting:
    """The leases that sessions wait for. Any thread may call."""

    def __init__(self, manager: Manager | None) -> None:
        self._manager = manager
        self._lock = threading.Lock()
        self._leases: dict[str | None, set[Lease]] = {}

    @contextmanager
    def told(self, model: str | None) -> Iterator[None]:
        """Within this block, what happens to the model and to its queue is told to the person whose event this is."""
        if self._manager is None or model is None:
            yield
            return
        teller, whose = _Teller(self._manager, model), session()

        def watch(lease: Lease) -> None:
            teller.lease = lease
            with self._lock:
                self._leases.setdefault(whose, set()).add(lease)

        unsubscribe = self._manager.subscribe(teller.listen)
        try:
            teller.begin()
            with self._manager.watching(watch):
                yield
        finally:
            unsubscribe()
            with self._lock:
                for who, leases in list(self._leases.items()):  # by now they may be another session's
                    if teller.lease is not None:
                        leases.discard(teller.lease)
                    if not leases:
                        del self._leases[who]

    def inherit(self, before: str, whose: str) -> None:
        """A session goes on as another, which now waits for what the first did."""
        with self._lock:
            if leases := self._leases.pop(before, None):
                self._leases.setdefault(whose, set()).update(leases)

    def gone(self, whose: str) -> None:
        """Nobody of this session listens any more: what still waits in a queue leaves it; what runs goes on."""
        with self._lock:
            leases = list(self._leases.get(whose, ()))
        for lease in leases:
            lease.cancel()


class _Teller:
    """Says to one person what their request waits for."""

    def __init__(self, manager: Manager, model: str) -> None:
        self._model, self._speak = model, speaker()
        self._context, self._progress = contextvars.copy_context(), gr.Progress()
        status = manager.status()
        self._kind, self._present = status["device"]["kind"], status["models"].get(model, {})
        self.lease: Lease | None = None

    def begin(self) -> None:
        if way := self._present.get("progress"):
            self._say_way(way["to"], way["phase"], way["bytes"], way["total_bytes"], way["bytes_per_s"])
        elif self._present.get("leases"):
            self._say(words.in_use(self._speak))
        elif self._present.get("state") == "gpu":
            self._say(words.ready(self._speak), 1.0)

    def listen(self, event: Any) -> None:
        if event.model != self._model:
            return
        place = self.lease.place if self.lease else None
        if place is not None and place > 1:
            self._say(words.queued(place, self._speak))
        elif event.what in ("began", "progress"):
            self._say_way(event.target, event.phase, event.done_bytes, event.total_bytes, event.bytes_per_s)
        elif event.what == "done" and (arrival := words.arrived(event.target, self._speak)):
            self._say(arrival, 1.0)
        elif event.what == "queue" and event.source == "gpu" and place is not None:
            self._say(*((words.in_use(self._speak),) if place else (words.ready(self._speak), 1.0)))

    def _say(self, sentence: str, share: float = 0.0) -> None:
        # The context tells Gradio whose event it is; a copy, since two threads cannot be in the same one.
        # Pages show no sentence without a share, so one that nobody knows is 0.
        self._context.copy().run(self._progress, share, desc=sentence)

    def _say_way(
        self, target: str, phase: str, done_bytes: int, total_bytes: int | None, bytes_per_s: float | None
    ) -> None:
        sentence = words.on_its_way(self._kind, target, phase, done_bytes, total_bytes, bytes_per_s, self._speak)
        self._say(sentence, words.share(done_bytes, total_bytes) or 0.0)
