"""Who waits for an answer reads why: what the model does, in Gradio's own line of progress.

Before it is a request's turn, Gradio shows its place in the queue there; this is for what comes after. Programs read
the same in ``job.status()`` of ``gradio_client``.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from . import words
from .compat import speaker
from .protocols import Manager


@contextmanager
def told(manager: Manager | None, model: str | None) -> Iterator[None]:
    """Within this block, what happens to the model is told to the person whose event this is."""
    if manager is None or model is None:
        yield
        return
    context, progress, speak = contextvars.copy_context(), gr.Progress(), speaker()
    status = manager.status()
    kind, present = status["device"]["kind"], status["models"].get(model, {})

    def say(sentence: str, share: float = 0.0) -> None:
        # The context tells Gradio whose event it is; a copy, since two threads cannot be in the same one.
        # Pages show no sentence without a share, so one that nobody knows is 0.
        context.copy().run(progress, share, desc=sentence)

    def say_way(target: str, phase: str, done_bytes: int, total_bytes: int | None, rate: float | None) -> None:
        sentence = words.on_its_way(kind, target, phase, done_bytes, total_bytes, rate, speak)
        say(sentence, words.share(done_bytes, total_bytes) or 0.0)

    def listen(event: Any) -> None:
        if event.model == model:
            if event.what in ("began", "progress"):
                say_way(event.target, event.phase, event.done_bytes, event.total_bytes, event.bytes_per_s)
            elif event.what == "done" and (arrival := words.arrived(event.target, speak)):
                say(arrival, 1.0)

    unsubscribe = manager.subscribe(listen)
    try:
        if way := present.get("progress"):
            say_way(way["to"], way["phase"], way["bytes"], way["total_bytes"], way["bytes_per_s"])
        elif present.get("leases"):
            say(words.in_use(speak))
        elif present.get("state") == "gpu":
            say(words.ready(speak), 1.0)
        yield
    finally:
        unsubscribe()
