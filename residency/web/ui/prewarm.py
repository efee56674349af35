"""Prewarms the model when a user starts an upload or types."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ...errors import OverBudget
from ..shared.gradio_compat import PRIVATE
from ..shared.protocols import Manager

logger = logging.getLogger(__name__)

EVERY_S = 3.0
"""Minimum interval between calls of the manager, and between requests of a page while the user types."""

_TYPING = f"""() => {{
  if (Date.now() < (window.nextPrewarm ?? 0)) return;
  window.nextPrewarm = Date.now() + {EVERY_S * 1000:g};
  document.querySelector("#prewarm").click();
}}"""


class Prewarm:
    """Prewarming of a model that is not in use.

    Without a request the model is offloaded again as after any `Manager.warm`. Skips a model whose last move failed,
    so that a request reports the error; does not skip after `OverBudget`, since room may be free by now.
    """

    def __init__(self, manager: Manager, model: str, now: Callable[[], float] = time.monotonic) -> None:
        self._manager = manager
        self._model = model
        self._now = now
        self._lock = threading.Lock()
        self._silent_until_s = now()

    def register(self, texts: Sequence[gr.Textbox], recording: gr.Audio, choices: Sequence[Any]) -> None:
        """Connects the inputs while the page is drawn; ``choices`` are the events that choose a voice.

        `RequestMiddleware` detects the start of an upload.
        """
        button = gr.Button(elem_id="prewarm")  # hidden by CSS, since Gradio does not draw invisible components
        acts = [recording.start_recording, recording.upload, *choices]
        for event in (button.click, *acts):
            event(self.show, queue=False, show_progress="hidden", trigger_mode="once", **PRIVATE)
        for text in texts:
            gr.on([text.focus, text.input], None, js=_TYPING, **PRIVATE)

    def show(self) -> None:
        """Warms the model, since a request is likely. Thread-safe; never raises or waits for a move; rate-limited."""
        with self._lock:
            now_s = self._now()
            if now_s < self._silent_until_s:
                return
            self._silent_until_s = now_s + EVERY_S
        try:
            error = self._manager.status()["models"][self._model]["last_error"]
            if error is None or error.startswith(OverBudget.__name__):
                self._manager.warm(self._model, if_idle=True)
        except Exception:
            logger.debug("Prewarming %s failed", self._model, exc_info=True)
