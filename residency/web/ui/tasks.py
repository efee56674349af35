"""The menus of tasks and sub-tasks, and the line that describes the chosen one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from ..shared.gradio_compat import PRIVATE, localizer
from ..speech.task_names import choices, line
from .labels import label
from .messages import MessagePlaces


class Tasks:
    """Components and handlers of the menus; one object serves all sessions."""

    def __init__(self, edit_types: Mapping[str, Sequence[str]], places: MessagePlaces) -> None:
        self._edit_types, self._places = edit_types, places

    def draw(self) -> None:
        """Draws the menus into the open Blocks; `SavedInputs` sets the names of tasks."""
        with gr.Row():  # on a phone one below the other, so that names have room
            with gr.Column(min_width=240):
                tasks = list(self._edit_types)
                self.task = gr.Dropdown(label=label("任务", "Task"), choices=tasks, value="clone", elem_id="task")
                self._places.draw("task")
            with gr.Column(min_width=240):
                self.sub_task = gr.Dropdown(
                    label=label("子任务", "Sub-task"), choices=[], interactive=False, elem_id="sub-task"
                )
                self._places.draw("sub_task")
        self.line = gr.Markdown(line("clone", None, label), elem_id="task-line")

    def register(self) -> None:
        """Connects the components of `draw`, only for user input: `SavedInputs` restores the sub-task too."""
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", **PRIVATE}
        self.task.input(**self._places.wiping("task", "sub_task"))
        self.sub_task.input(**self._places.wiping("sub_task"))
        self.task.input(self._choose, self.task, [self.sub_task, self.line], **at_once)
        self.sub_task.input(
            lambda task, sub_task: line(task, sub_task, localizer()), [self.task, self.sub_task], self.line, **at_once
        )

    def _choose(self, task: str) -> tuple[Any, str]:
        update = sub_tasks_update(self._edit_types, task)
        return update, line(task, update["value"], localizer())


def sub_tasks_update(edit_types: Mapping[str, Sequence[str]], task: str, sub_task: str | None = None) -> Any:
    """Returns an update of the sub-task dropdown for a task; selects ``sub_task`` if valid, otherwise the first."""
    values = list(edit_types.get(task, []))
    chosen = sub_task if sub_task in values else next(iter(values), None)
    return gr.update(choices=choices(values, task, localizer()), value=chosen, interactive=bool(values))
