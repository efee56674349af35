"""The accordion with the GPU's state and three buttons. Looking at it never counts as use."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ..errors import ResidencyError
from . import words
from .compat import PRIVATE
from .protocols import Manager

logger = logging.getLogger(__name__)

TICK_S = 1.0


class GpuPanel:
    """Shows what the manager says, and passes on what people press.

    `text`, `offload` and `release` may be called from any thread and raise nothing: an error becomes their answer.
    """

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def html(self) -> str:
        return words.as_html(self._manager.status())

    def text(self) -> str:
        return words.as_text(self._manager.status())

    def offload(self, name: str | None = None) -> str:
        """Bring a model (None: all) to main memory; say what came of it."""
        return self._press("offload", name)

    def release(self, name: str | None = None) -> str:
        """Free a model's memory (None: all) everywhere; say what came of it."""
        return self._press("release", name)

    def _press(self, action: str, name: str | None) -> str:
        try:
            done = self._manager.offload(name) if action == "offload" else self._manager.release(name)
        except ResidencyError as error:
            return str(error)
        except Exception as error:
            logger.exception("%s by hand failed", action)
            return f"操作失败 / It failed: {error}"
        return words.pressed(action, done, self._manager.status())

    def register_components(self) -> None:
        """Draw the panel into the Blocks that are open."""
        with gr.Accordion("🎮 GPU 显存管理 / GPU memory", open=True, elem_id="gpu-panel"):
            self._status = gr.HTML(elem_id="gpu-status")
            with gr.Row():
                self._refresh = gr.Button("🔄 刷新状态 / Refresh", size="sm", elem_id="gpu-refresh")
                self._offload = gr.Button("💾 卸载到CPU / Offload to CPU", size="sm", elem_id="gpu-offload")
                self._release = gr.Button("🗑️ 完全释放 / Release", size="sm", elem_id="gpu-release")
            self._message = gr.HTML(elem_id="gpu-message")
            self._timer = gr.Timer(TICK_S)

    def register_events(self, forget_message: Sequence[Callable[..., Any]] = ()) -> None:
        """Connect the buttons and the clock; on events of ``forget_message`` the line about the last press goes."""
        looking: dict[str, Any] = {"show_progress": "hidden", "queue": False, **PRIVATE}
        # No triggers: when the page is opened.
        gr.on(None, self.html, outputs=self._status, **looking)
        self._timer.tick(self.html, outputs=self._status, trigger_mode="once", **looking)
        self._refresh.click(lambda: (self.html(), ""), outputs=[self._status, self._message], **looking)
        for event in forget_message:
            event(lambda: "", outputs=self._message, **looking)
        for button, press in ((self._offload, self.offload), (self._release, self.release)):
            button.click(
                lambda press=press: _paragraph(press()), outputs=self._message, show_progress="minimal", **PRIVATE
            ).then(self.html, outputs=self._status, **looking)


def _paragraph(sentence: str) -> str:
    return f"<p role='status'>{html.escape(sentence)}</p>"
