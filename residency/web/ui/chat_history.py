"""History of each session, and its messages for the chat."""

from __future__ import annotations

import html
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import gradio as gr

from ...errors import InvalidInput
from ..shared.gradio_compat import session, supported
from ..shared.language import Localize, both, mark
from ..speech.recordings import Recordings
from ..speech.task_names import sub_task_name, task_name


@dataclass(frozen=True)
class Step:
    """A successful request; recordings are file paths."""

    edit_type: str | None
    edit_info: str | None
    source_text: str | None
    target_text: str | None
    source_audio: str | None
    result_audio: str


class SessionState(TypedDict):
    """State of a session: ``history_audio`` is [(file, text)], ``message`` the `Message` of the latest error or empty.

    Changed in place, since several requests of a session may run. A new history has new lists, by whose identity a late
    request detects that its history was replaced.
    """

    history_audio: list[tuple[str, str | None]]
    history_messages: list[Step]
    message: str


class ChatMessage(TypedDict):
    """A message for `gr.Chatbot`; ``content`` is a text or a component."""

    role: Literal["user", "assistant"]
    content: str | gr.Audio


def new_state() -> SessionState:
    return {"history_audio": [], "history_messages": [], "message": ""}


class Overtaken(InvalidInput):
    """Error of a request that ends after its history was cleared or replaced."""

    def __init__(self) -> None:
        super().__init__(
            "The history was cleared or replaced meanwhile, so this result was dropped: send the request again if you "
            "want it",
            "期间历史已被清空或重新开始，本次结果未保留：如仍需要，请重新提交",
        )


class Histories:
    """Updates of the `SessionState` of sessions and of the owners in `Recordings`. Thread-safe."""

    def __init__(self, recordings: Recordings) -> None:
        self._recordings = recordings
        self._lock = threading.Lock()

    def append(self, state: SessionState, history: list[Any], *steps: Step, anew: bool = False) -> None:
        """Appends results to their history, or starts a new one with them.

        ``history`` is the ``history_audio`` at the start of the request; raises `Overtaken` if it was replaced.
        """
        results = [step.result_audio for step in steps]
        self._recordings.own(session(), *results)
        with self._lock:
            if state["history_audio"] is history:
                if anew:
                    self._clear(state)
                state["history_audio"] += [(step.result_audio, step.target_text) for step in steps]
                state["history_messages"] += steps
                return
        self._recordings.remove(session(), *results)
        raise Overtaken

    def clear(self, state: SessionState) -> None:
        with self._lock:
            self._clear(state)

    def _clear(self, state: SessionState) -> None:
        self._recordings.remove(session(), *(path for path, _ in state["history_audio"]))
        state.update(new_state())


def as_messages(steps: Iterable[Step], localize: Localize = both) -> list[ChatMessage]:
    """Returns, for each step, text and player of the input, then of the output."""
    shown: list[ChatMessage] = []
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
    """Escapes only tags and entities, so that the page shows ``text`` literally and the rest can be copied."""

    def as_seen(found: re.Match[str]) -> str:
        piece = found[0]
        return html.escape(piece) if piece == "<" or html.unescape(piece) != piece else piece

    return re.sub(r"<(?=[A-Za-z/!?])|&#?\w+;?", as_seen, text)


def _player(path: str | None) -> gr.Audio:
    return gr.Audio(value=path, interactive=False, show_label=False, **supported(gr.Audio, buttons=["download"]))
