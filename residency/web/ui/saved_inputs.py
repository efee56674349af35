"""Restores the inputs of a page after a reload: texts, recording, task and sub-task.

The browser stores them in `sessionStorage`, per tab, until the tab is closed; `page_sessions` deletes them if a session
does not continue. The texts never leave the browser for this. The recording is restored if the server still has it;
otherwise the page shows a message beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import gradio as gr

from ...errors import InvalidInput
from .. import static
from ..shared.gradio_compat import PRIVATE, localizer, session
from ..speech.recordings import Recordings
from ..speech.task_names import choices, line
from .messages import Message
from .tasks import Tasks, sub_tasks_update

_GONE = (
    "The recording is no longer on the server: upload or record it again, or choose a sample voice",
    "服务器上已没有该录音：请重新上传或录制，或点击示例声音",
)


class SavedInputs:
    """Storage and restore of page inputs. Thread-safe."""

    def __init__(self, recordings: Recordings, edit_types: Mapping[str, Sequence[str]]) -> None:
        self._recordings, self._edit_types = recordings, edit_types

    def register(
        self,
        continued: Any,
        texts: Sequence[gr.Textbox],
        recording: gr.Audio,
        tasks: Tasks,
        history: gr.Chatbot,
        about_recording: gr.HTML,
    ) -> Any:
        """Connects the components while the page is drawn. ``continued`` is the event after which a session continues.

        Returns the event that restores the recording.
        """
        script = partial(static.calling, "saved_inputs.js")
        kept = gr.Textbox(visible=False)
        menus = [tasks.task, tasks.sub_task]
        inputs: list[Any] = [*texts, recording, *menus]
        hidden: dict[str, Any] = {"show_progress": "hidden", "queue": False, **PRIVATE}
        back = continued.then(
            self.restore, kept, [recording, about_recording, *menus, tasks.line], js=script("read()"), **hidden
        )
        back.then(None, list(texts), list(texts), js=script("restoreTexts(...values)"), **PRIVATE)
        kept_from = [*inputs, history]
        gr.on([each.change for each in kept_from], None, kept_from, None, js=script("keep(...values)"), **PRIVATE)
        return back

    def restore(self, kept: str | None) -> tuple[Any, Any, Any, Any, Any]:
        """Returns updates of recording, its message, task, sub-task and their line, from a page's stored inputs.

        Ignores invalid input. Also sets the names of tasks, since Gradio 5 does not translate choices.
        """
        recording, task, sub_task = _parsed(kept)
        is_owned = self._recordings.owns(session(), recording) and os.path.isfile(recording)
        audio, localize = recording if is_owned else gr.skip(), localizer()
        message = Message.of(InvalidInput(*_GONE, "recording"), localize) if recording and not is_owned else gr.skip()
        names = choices([*self._edit_types], None, localize)
        if task not in self._edit_types:
            return audio, message, gr.update(choices=names), gr.skip(), gr.skip()
        sub_tasks = sub_tasks_update(self._edit_types, task, sub_task)
        return audio, message, gr.update(choices=names, value=task), sub_tasks, line(task, sub_tasks["value"], localize)


def _parsed(kept: str | None) -> tuple[str, str, str]:
    """Returns the path of the recording, task and sub-task; empty if missing or invalid."""
    try:
        recording, task, sub_task = (each if isinstance(each, str) else "" for each in json.loads(kept or ""))
    except (TypeError, ValueError):
        return "", "", ""
    return recording, task, sub_task
