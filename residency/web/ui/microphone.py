"""Hint for browsers that deny the page the microphone, as on phones over plain HTTP."""

from __future__ import annotations

import gradio as gr

from ..shared.gradio_compat import PRIVATE
from .labels import label


def draw_hint() -> None:
    """Draws the hint into the open Blocks; only browsers that deny the microphone show it."""
    hint = gr.Markdown(
        label(
            "🎤 浏览器只向 https 页面提供麦克风，而本页面是通过 http 打开的：请上传录音，或用 https 打开（启动时加上 "
            "--ssl-certfile 与 --ssl-keyfile，或使用反向代理）。",
            "🎤 Browsers give only https pages the microphone, and this page was opened over http: upload a recording, "
            "or open it over https (start the app with --ssl-certfile and --ssl-keyfile, or behind a reverse proxy).",
        ),
        visible=False,
        elem_id="no-microphone",
    )
    no_triggers = None  # when the page is opened
    gr.on(
        no_triggers, None, outputs=hint, js="() => ({__type__: 'update', visible: !window.isSecureContext})", **PRIVATE
    )
