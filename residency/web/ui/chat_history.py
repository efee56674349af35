"""The history of each session and its messages for the chat."""

from __future__ import annotations

import html
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ...errors import InvalidInput
from ..shared.gradio_compat import session, supported
from ..shared.language import Localize, both, mark
from ..speech.recordings import Recordings
from ..speech.task_names import sub_task_name, task_name


@dataclass(frozen=True)
class Step:
    """One request that succeeded; recordings are files."""

    edit_type: str | None
    edit_info: str | None
    source_text: str | None
    target_text: str | None
    source_audio: str | None
    result_audio: str


State = dict[str, Any]
"""Of one session: ``history_audio`` is [(file, text)], ``history_messages`` is [`Step`], ``message`` is a
`messages.Message` of what was wrong with its latest request, empty if nothing was.

It is changed in place, since several requests of a session may run. A history that begins anew has lists of its own: by
them a request that ends late sees that it is not about this one.
"""


def new_state() -> State:
    return {"history_audio": [], "history_messages": [], "message": ""}


class Overtaken(InvalidInput):
    """A request ends late: another has cleared its history, or begun a new one."""

    def __init__(self) -> None:
        super().__init__(
            "The history was cleared or begun anew meanwhile, so this result was dropped: ask again if you want it",
            "期间历史已被清空或重新开始，本次结果未保留：如仍需要，请重新提交",
        )


class Histories:
    """Changes the `State` of sessions, and gives their results to `Recordings`. Thread-safe.

    ``history`` is the ``history_audio`` that a request has begun with; `Overtaken` if it is not the present one.
    """

    def __init__(self, recordings: Recordings) -> None:
        self._recordings = recordings
        self._lock = threading.Lock()

    def go_on(self, state: State, history: list[Any], step: Step) -> None:
        """A result is the next of its history."""
        with self._of_the_present(state, history, step):
            _append(state, step)

    def begin(self, state: State, history: list[Any], step: Step) -> None:
        """A result is the first of a new history."""
        with self._of_the_present(state, history, step):
            self._begin_anew(state)
            _append(state, step)

    def clear(self, state: State) -> None:
        with self._lock:
            self._begin_anew(state)

    def _begin_anew(self, state: State) -> None:
        self._recordings.remove(session(), *(path for path, _ in state["history_audio"]))
        state.update(new_state())

    @contextmanager
    def _of_the_present(self, state: State, history: list[Any], step: Step) -> Iterator[None]:
        self._recordings.own(session(), step.result_audio)
        with self._lock:
            if state["history_audio"] is history:
                yield
                return
        self._recordings.remove(session(), step.result_audio)
        raise Overtaken


def _append(state: State, step: Step) -> None:
    state["history_audio"].append((step.result_audio, step.target_text))
    state["history_messages"].append(step)


def as_messages(steps: Iterable[Step], localize: Localize = both) -> list[dict[str, Any]]:
    """Messages for `gr.Chatbot`: for each step text and player of the input, then text and player of the output."""
    shown: list[dict[str, Any]] = []
    colon = mark(":", localize)
    for step in steps:
        task = " · ".join(_names(step, localize))
        asked = f"{localize('任务', 'Task')}{colon}{task}\n{localize('文本', 'Text')}{colon}{step.source_text or '—'}"
        shown += [
            {"role": "user", "content": _literal(asked)},
            {"role": "user", "content": _player(step.source_audio)},
            {"role": "assistant", "content": _literal(f"{localize('输出', 'Output')}{colon}{step.target_text or '—'}")},
            {"role": "assistant", "content": _player(step.result_audio)},
        ]
    return shown


def _names(step: Step, localize: Localize) -> Iterator[str]:
    if step.edit_type:
        yield task_name(step.edit_type, localize)
        if step.edit_info:
            yield sub_task_name(step.edit_type, step.edit_info, localize)


def _literal(text: str) -> str:
    """What a page shows as this very text. Only what it would take for HTML is changed: people may copy the rest."""

    def as_seen(found: re.Match[str]) -> str:
        piece = found[0]
        return html.escape(piece) if piece == "<" or html.unescape(piece) != piece else piece

    return re.sub(r"<(?=[A-Za-z/!?])|&#?\w+;?", as_seen, text)


def _player(path: str | None) -> gr.Audio:
    return gr.Audio(value=path, interactive=False, show_label=False, **supported(gr.Audio, buttons=["download"]))
