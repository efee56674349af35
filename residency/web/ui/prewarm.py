"""Prewarms the model when a user begins to upload or to type."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import gradio as gr

from ...errors import OverBudget
from ..shared.gradio_compat import PRIVATE
from ..shared.protocols import Manager

logger = logging.getLogger(__name__)

EVERY_S = 3.0
"""The manager is called at most this often, and a page that is typed into sends at most one request in this time."""

_TYPING = f"""() => {{
  if (Date.now() < (window.nextPrewarm ?? 0)) return;
  window.nextPrewarm = Date.now() + {EVERY_S * 1000:g};
  document.querySelector("#prewarm").click();
}}"""


class Prewarm:
    """Prewarms a model that is not in use.

    `show` may be called from any thread and as often as one likes; it never raises and waits for no move.

    Without a request the model leaves again as after any `Manager.warm`. One whose last move has failed is left to
    requests, which tell people the error; not so one that found no room, since others come and go.
    """

    def __init__(self, manager: Manager, model: str, now: Callable[[], float] = time.monotonic) -> None:
        self._manager = manager
        self._model = model
        self._now = now
        self._lock = threading.Lock()
        self._silent_until_s = now()

    def register(self, texts: Sequence[gr.Textbox], recording: gr.Audio, samples: Sequence[gr.Button]) -> None:
        """Connect the inputs of the page while it is drawn. `RequestMiddleware` sees when an upload begins."""
        button = gr.Button(elem_id="prewarm")  # hidden by style: Gradio does not draw what is invisible
        acts = [recording.start_recording, recording.upload, *(sample.click for sample in samples)]
        for event in (button.click, *acts):
            event(self.show, queue=False, show_progress="hidden", trigger_mode="once", **PRIVATE)
        for text in texts:
            gr.on([text.focus, text.input], None, js=_TYPING, **PRIVATE)

    def show(self) -> None:
        """Report that a request is likely to follow."""
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
            logger.debug("%s cannot be warmed", self._model, exc_info=True)
