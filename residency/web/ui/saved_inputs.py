"""Restores the inputs of a page after a reload: texts, recording, task and sub-task.

The browser stores them in `sessionStorage`, per tab, until the tab is closed; `page_sessions` deletes them if a visit
does not continue. The texts never leave the browser for this. The recording is restored if the server still has it;
otherwise the page shows a message beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from ...errors import InvalidInput
from ..shared.gradio_compat import PRIVATE, localizer, session
from ..speech.recordings import Recordings
from ..speech.task_names import choices, line
from .messages import Message

# Stores only the length of the history, from which `page_sessions` detects whether results were lost.
_KEEP = """(prompt, target, recording, task, subTask, history) => {
  const back = window.textsBack;  // Gradio writes them into their fields a moment later
  const emptied = id => document.activeElement?.closest(id);
  if (back && !emptied("#prompt-text")) prompt ||= back.prompt;
  if (back && !emptied("#target-text")) target ||= back.target;
  const before = window.inputs ?? {};
  window.inputs = {prompt, target, recording: recording?.path ?? null, task, subTask, steps: history?.length ?? 0};
  if (window.keepsInputs) {
    sessionStorage.setItem("inputs", JSON.stringify(window.inputs));
    return;
  }
  // The stored inputs are not restored yet: only what was filled in on this page replaces them, also if emptied again.
  const kept = JSON.parse(sessionStorage.getItem("inputs") ?? "{}");
  const now = {prompt, target, recording: window.inputs.recording};
  const filled = Object.entries(now).filter(([name, value]) => value || before[name]);
  sessionStorage.setItem("inputs", JSON.stringify({...kept, ...Object.fromEntries(filled)}));
}"""
_READ = """() => {
  const {recording, task, subTask} = JSON.parse(sessionStorage.getItem("inputs") ?? "{}");
  return JSON.stringify([recording ?? null, task ?? null, subTask ?? null]);
}"""
# Texts that are filled in already are newer than stored ones.
_TEXTS = """(prompt, target) => {
  const kept = JSON.parse(sessionStorage.getItem("inputs") ?? "{}");
  const texts = {prompt: prompt || (kept.prompt ?? ""), target: target || (kept.target ?? "")};
  window.textsBack = texts;
  setTimeout(() => { window.textsBack = null; }, 200);
  window.keepsInputs = true;
  const recording = window.inputs?.recording ?? kept.recording ?? null;
  sessionStorage.setItem("inputs", JSON.stringify({...kept, ...texts, recording}));
  return [texts.prompt, texts.target];
}"""

_GONE = (
    "The recording is gone from the server: upload or record it again, or press a sample voice",
    "服务器上已没有该录音：请重新上传或录制，或点击示例声音",
)


class SavedInputs:
    """Storage and restore of page inputs. Thread-safe."""

    def __init__(self, recordings: Recordings, edit_types: Mapping[str, Sequence[str]]) -> None:
        self._recordings, self._edit_types = recordings, edit_types

    def register(
        self,
        came: Any,
        texts: Sequence[gr.Textbox],
        recording: gr.Audio,
        tasks: Sequence[gr.Dropdown],
        task_line: gr.Markdown,
        history: gr.Chatbot,
        about_recording: gr.HTML,
    ) -> Any:
        """Connects the components while the page is drawn. ``came`` is the event after which a visit continues.

        Returns the event that restores the recording.
        """
        kept = gr.Textbox(visible=False)
        inputs: list[Any] = [*texts, recording, *tasks]
        hidden: dict[str, Any] = {"show_progress": "hidden", "queue": False, **PRIVATE}
        back = came.then(self.bring_back, kept, [recording, about_recording, *tasks, task_line], js=_READ, **hidden)
        back.then(None, list(texts), list(texts), js=_TEXTS, **PRIVATE)
        kept_from = [*inputs, history]
        gr.on([each.change for each in kept_from], None, kept_from, None, js=_KEEP, **PRIVATE)
        return back

    def bring_back(self, kept: str | None) -> tuple[Any, Any, Any, Any, Any]:
        """Returns updates of recording, its message, task, sub-task and their line, from a page's stored inputs.

        Ignores invalid input. Also sets the names of tasks, since Gradio 5 does not translate choices.
        """
        recording, task, sub_task = _parsed(kept)
        mine = self._recordings.owns(session(), recording) and os.path.isfile(recording)
        audio, localize = recording if mine else gr.skip(), localizer()
        news = Message.of(InvalidInput(*_GONE, "recording"), localize) if recording and not mine else gr.skip()
        names = choices([*self._edit_types], None, localize)
        if task not in self._edit_types:
            return audio, news, gr.update(choices=names), gr.skip(), gr.skip()
        sub_tasks = sub_tasks_update(self._edit_types, task, sub_task)
        return audio, news, gr.update(choices=names, value=task), sub_tasks, line(task, sub_tasks["value"], localize)


def sub_tasks_update(edit_types: Mapping[str, Sequence[str]], task: str, sub_task: str | None = None) -> Any:
    """Returns an update of the sub-task dropdown for a task; selects ``sub_task`` if valid, otherwise the first."""
    values = list(edit_types.get(task, []))
    chosen = sub_task if sub_task in values else next(iter(values), None)
    return gr.update(choices=choices(values, task, localizer()), value=chosen, interactive=bool(values))


def _parsed(kept: str | None) -> tuple[str, str, str]:
    """Returns the path of the recording, task and sub-task; empty if missing or invalid."""
    try:
        recording, task, sub_task = (each if isinstance(each, str) else "" for each in json.loads(kept or ""))
    except (TypeError, ValueError):
        return "", "", ""
    return recording, task, sub_task
