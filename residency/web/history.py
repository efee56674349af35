"""What a session has done so far, as the chat on the page shows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from .compat import supported
from .language import Say, both


@dataclass(frozen=True)
class Step:
    """One request that succeeded; recordings are files."""

    edit_type: str | None
    edit_info: str | None
    source_text: str | None
    target_text: str | None
    source_audio: str | None
    result_audio: str


def as_messages(steps: Iterable[Step], say: Say = both) -> list[dict[str, Any]]:
    """Messages for `gr.Chatbot`: for each step text and player of the input, then text and player of the output."""
    shown: list[dict[str, Any]] = []
    for step in steps:
        task = " · ".join(filter(None, (step.edit_type, step.edit_info)))
        shown += [
            {
                "role": "user",
                "content": f"{say('任务', 'Task')}: {task}\n{say('文本', 'Text')}: {step.source_text or '—'}",
            },
            {"role": "user", "content": _player(step.source_audio)},
            {"role": "assistant", "content": f"{say('输出', 'Output')}: {step.target_text or '—'}"},
            {"role": "assistant", "content": _player(step.result_audio)},
        ]
    return shown


def _player(path: str | None) -> gr.Audio:
    return gr.Audio(value=path, interactive=False, show_label=False, **supported(gr.Audio, buttons=["download"]))
