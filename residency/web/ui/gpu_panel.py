"""The accordion with the GPU's state and buttons. Reading it never counts as use.

``panel.js`` fetches its content as HTML pieces from `GpuPanel.news` and inserts them.
"""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gradio as gr

from ...errors import NotAllowed, ResidencyError
from ...status_types import Status
from .. import static
from ..server.permissions import Permissions
from ..shared.gradio_compat import PRIVATE, localizer
from ..shared.language import Localize, both, mark, translated
from ..shared.protocols import Manager
from . import sharing_views, status_text, views
from .labels import label

logger = logging.getLogger(__name__)

ACTIONS = {
    "warm": ("🔥 加载到 GPU", "🔥 Warm up"),
    "offload": ("💾 卸载到内存", "💾 Offload to main memory"),
    "release": ("🗑️ 完全释放", "🗑️ Release"),
}
_ALL = ""


class GpuPanel:
    """Status display and controls of the manager.

    `text`, `press` and `configure` are thread-safe; `press` and `configure` return errors as text.
    """

    def __init__(self, manager: Manager, permissions: Permissions) -> None:
        self._manager = manager
        self._permissions = permissions
        self._presses: list[tuple[gr.Button, str, str | None]] = []

    def text(self) -> str:
        return status_text.as_text(self._manager.status())

    def news(self, localize: Localize, known: int | None = None) -> dict[str, object] | None:
        """Returns what the page shows, or None if ``known`` is the current version.

        ``pieces`` is HTML by place (see `register_components`), ``version`` their version, ``moving`` whether a model
        moves, ``outcomes`` the result of the last press for each model, None while it is pending.
        """
        version = self._manager.version
        if version == known:
            return None
        status = self._manager.status()
        kind = status["device"]["kind"]
        outcomes = {name: status_text.outcome(name, model, kind, localize) for name, model in status["models"].items()}
        return {
            "version": version,
            "pieces": self._pieces(status, localize),
            "moving": any(model["state"] == "moving" for model in status["models"].values()),
            "outcomes": {name: sentence and _paragraph(sentence) for name, sentence in outcomes.items()},
        }

    def _pieces(self, status: Status, localize: Localize) -> dict[str, str]:
        return {
            "device": views.device_html(status, localize),
            **{f"model-{name}": views.model_html(name, status, localize) for name in status["models"]},
            "sharing": sharing_views.sharing_html(status, localize),
            "stay": views.stay_html(status, localize),
            "past": views.past_html(self._manager.history(), status["device"]["kind"], localize),
            "asked": _paragraph(localize("已请求让出显存。", "It was asked, and has answered.")),
            "lost": localize("连接已断开，正在重新连接…", "Connection lost; reconnecting…"),
            "strange": localize("登录已失效：请刷新页面重新登录。", "You are signed out: reload the page and sign in."),
        }

    def press(self, action: str, name: str | None = None, localize: Localize = both) -> tuple[str, list[str]]:
        """Warms, offloads or releases a model (None: all).

        Returns the outcome as text, or when it will happen, and the models whose outcome is pending.
        """
        try:
            done = getattr(self._manager, action)(name)
        except ResidencyError as error:
            return translated(error, localize), []
        except Exception as error:
            logger.exception("Manual %s failed", action)
            return f"{localize('操作失败', 'The action failed')}{mark(':', localize)}{error}", []
        status = self._manager.status()
        pending = [] if done else [name] if name else list(status["models"])
        return status_text.pressed(action, name, done, status, localize), pending

    def configure(
        self, name: str | None, keep_warm: str | None, idle_timeout: str | None, localize: Localize = both
    ) -> str:
        """Changes the timeouts of a model (None: all), except those that are empty; returns the outcome as text."""
        given = {"keep_warm": (keep_warm or "").strip(), "idle_timeout": (idle_timeout or "").strip()}
        times = {which: time for which, time in given.items() if time}
        if not times:
            return localize(
                "未填写时长：请先填写，如 30s、5m 或 -1（永不）。",
                "No time is given: enter one, such as 30s, 5m or -1.",
            )
        try:
            self._manager.configure(name, **times)
        except ResidencyError as error:
            return translated(error, localize)
        return localize("已更改，立即生效。", "Changed; it applies from now on.")

    # -- the page -----------------------------------------------------------------------------------------------

    def register_components(self) -> None:
        """Draws the panel into the open Blocks."""
        names = self._manager.names()
        with gr.Accordion(label("🎮 GPU 显存管理", "🎮 GPU memory"), open=True, elem_id="gpu-panel"):
            style = static.text("panel.css")
            with gr.Column(elem_id="gpu-status"):
                gr.HTML(f"<style>{style}</style>{_place('line')}{_place('device')}{_place('sharing')}", padding=False)
                for name in names:
                    with gr.Column(elem_classes="gpu-model"):
                        gr.HTML(_place(f"model-{name}"), padding=False)
                        if len(names) > 1:
                            with gr.Row():
                                self._draw_buttons(name)
            with gr.Row():
                refresh = label("🔄 刷新状态", "🔄 Refresh")
                self._refresh = gr.Button(refresh, size="sm", elem_id="gpu-refresh", min_width=120)
                self._draw_buttons(None, of_many=len(names) > 1)
            gr.HTML(_place("pressed"), elem_id="gpu-message", padding=False)
            self._refusal = gr.HTML(elem_id="gpu-refusal", padding=False)
            with gr.Accordion(label("⏱️ 保持时间", "⏱️ How long models stay"), open=False):
                gr.HTML(_place("stay"), padding=False)
                with gr.Row():
                    choices = [(label("全部模型", "All models"), _ALL), *((name, name) for name in names)]
                    self._which = gr.Dropdown(choices, value=_ALL, label=label("模型", "Model"), visible=len(names) > 1)
                    self._keep_warm = gr.Textbox(
                        label=label("请求后保持在 GPU 上", "On the GPU after a request (keep-warm)"),
                        placeholder="0, 30s, 5m, auto, -1",
                        elem_id="gpu-keep-warm",
                    )
                    self._idle_timeout = gr.Textbox(
                        label=label("空闲多久后释放", "Idle until released (idle timeout)"),
                        placeholder="600, 15m, 1h, -1",
                        elem_id="gpu-idle-timeout",
                    )
                    self._apply = gr.Button(label("应用", "Apply"), size="sm", elem_id="gpu-apply", min_width=120)
            gr.HTML(_place("past"), elem_id="gpu-past", padding=False)
            # Text, since Gradio 5 passes JSON to scripts as a Python repr.
            self._news, self._pressed = gr.Textbox(visible=False), gr.Textbox(visible=False)

    def _draw_buttons(self, name: str | None, of_many: bool = False) -> None:
        for action, (chinese, english) in ACTIONS.items():
            text = label(f"{chinese}（全部）", f"{english} (all)") if of_many else label(chinese, english)
            element = f"gpu-{action}-{name}" if name else f"gpu-{action}"
            self._presses.append((gr.Button(text, size="sm", elem_id=element, min_width=120), action, name))

    def register_events(self) -> None:
        looking = {"show_progress": "hidden", "queue": False, **PRIVATE}
        opened = partial(gr.on, None)  # no triggers: when the page is opened
        opened(None, js=static.text("panel.js"), **PRIVATE)
        for event in (opened, self._refresh.click):
            event(lambda: json.dumps(self.news(localizer())), outputs=self._news, **looking).then(
                None, self._news, js="news => { window.gpuPanel?.show(JSON.parse(news)) }", **PRIVATE
            )
        changing = [*(button for button, _, _ in self._presses), self._apply]
        opened(self._permitting(len(changing)), outputs=[*changing, self._refusal], **looking)
        for button, action, name in self._presses:
            self._on_press(button, lambda localize, action=action, name=name: self.press(action, name, localize))
        times = [self._which, self._keep_warm, self._idle_timeout]
        self._on_press(
            self._apply,
            lambda localize, name, warm, idle: (self.configure(name or None, warm, idle, localize), []),
            times,
        )

    def _on_press(
        self, button: gr.Button, change: Callable[..., tuple[str, list[str]]], inputs: Sequence[Any] = ()
    ) -> None:
        """Connects a button: checks permissions, calls ``change``, and shows its text until the outcome is known."""

        def handler(request: gr.Request, *given: Any) -> str:
            localize = localizer()
            try:
                check(self._permissions, request)
                line, awaits = change(localize, *given)
            except NotAllowed as error:
                line, awaits = translated(error, localize), []
            return json.dumps({"line": _paragraph(line), "awaits": awaits, "version": self._manager.version})

        button.click(handler, list(inputs), self._pressed, show_progress="hidden", **PRIVATE).then(
            None, self._pressed, js="press => { window.gpuPanel?.showOutcome(JSON.parse(press)) }", **PRIVATE
        )

    def _permitting(self, buttons: int) -> Callable[..., list[Any]]:
        """Returns a page-load handler that disables the buttons, with a reason, if the user has no permission."""

        def handler(request: gr.Request) -> list[Any]:
            try:
                check(self._permissions, request)
            except NotAllowed as error:
                reason = _paragraph(translated(error, localizer()))
                return [*[gr.update(interactive=False)] * buttons, reason]
            return [gr.skip()] * (buttons + 1)

        return handler


def check(permissions: Permissions, request: gr.Request) -> None:
    """Raises `NotAllowed` unless the sender of a Gradio event may make changes."""
    if request.request is None:
        raise NotAllowed
    permissions.check(request.request, request.username)


def _place(piece: str) -> str:
    return f"<div data-gpu='{html.escape(piece, quote=True)}'></div>"


def _paragraph(sentence: str) -> str:
    return f"<p role='status'>{html.escape(sentence)}</p>"
