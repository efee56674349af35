"""A page that is loaded anew is a new session, and goes on with the history of the one before, and with what runs."""

from __future__ import annotations

import asyncio
import html
import secrets
import threading
from pathlib import Path
from typing import Any

import gradio as gr

from .compat import PRIVATE, session, speaker
from .history import Histories, State, as_messages
from .recordings import Recordings
from .waiting import Waiting

TELL_EVERY_S = 30.0
"""How often open pages tell that they are there."""

_LOOK_EVERY_S = 0.2
_GOES_ON = ".goes-on"
# Who reloads goes on with the visit. Who comes back by the history, only with one whose page has left: a duplicated tab comes
# so too, with a copy of what the tab keeps in which nobody has left. Copies that take nothing forget what they have copied.
_EARLIER = """(_, state) => {
  const way = document.wasDiscarded ? "reload" : performance.getEntriesByType("navigation")[0]?.type;
  const earlier = sessionStorage.getItem({reload: "visit", back_forward: "left"}[way]);
  sessionStorage.setItem("visit", earlier ?? "");
  sessionStorage.removeItem("left");
  return [earlier, state];
}"""


class Visits:
    """Sessions by a secret that their page keeps for when it is loaded anew. Thread-safe."""

    def __init__(self, histories: Histories, recordings: Recordings, waiting: Waiting) -> None:
        self._histories, self._recordings, self._waiting = histories, recordings, waiting
        self._lock = threading.Lock()
        self._visits: dict[str, tuple[str, State]] = {}

    def register(self, page: gr.Blocks, state: gr.State, chat: gr.Chatbot, message: gr.HTML) -> None:
        """While the page is being drawn; its server must know the path to which ``here.js`` sends."""
        visit = gr.Textbox(visible=False)
        script = (Path(__file__).parent / "here.js").read_text(encoding="utf-8")
        hidden: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
        going_on = gr.State("")
        # Pressed by here.js. Not invisible, since Gradio does not draw what is.
        hear_the_end = gr.Button(elem_id="hear-the-end")
        came = page.load(
            self._come, [visit, state], [visit, state, chat, message, going_on], js=_EARLIER, queue=False, **hidden
        )
        came.then(None, visit, js=script.replace("EVERY_MS", str(TELL_EVERY_S * 1000)), **PRIVATE)
        hear_the_end.click(self._hear_the_end, [state, going_on], [chat, message], concurrency_limit=None, **hidden)

    def end(self, whose: str) -> None:
        """The session is over, and nobody will come back to it."""
        with self._lock:
            self._visits = {visit: who for visit, who in self._visits.items() if who[0] != whose}

    def _come(self, earlier: str | None, state: State) -> tuple[str, State, Any, Any, str]:
        whose = session() or ""
        visit = f"{whose}.{secrets.token_urlsafe(16)}"
        with self._lock:
            before, state = self._visits.pop(earlier or "", (None, state))
            self._visits[visit] = (whose, state)
        if before is None:
            return visit, state, gr.skip(), gr.skip(), ""
        self._recordings.inherit(before, whose)
        self._waiting.inherit(before, whose)
        say, news = speaker(), ""
        latest = _latest(state)  # before it is asked whether more may come
        if self._histories.busy(state):
            visit += _GOES_ON
            news = _paragraph(say("先前的请求仍在进行…", "What you asked for before goes on…"))
        return visit, state, as_messages(state["history_messages"], say), news, latest

    async def _hear_the_end(self, state: State, latest: str) -> tuple[Any, Any]:
        while self._histories.busy(state):
            await asyncio.sleep(_LOOK_EVERY_S)
        say, outcome = speaker(), ""
        if _latest(state) == latest:
            outcome = _paragraph(say("先前的请求没有成功：请重新提交。", "It has failed: ask again."))
        return as_messages(state["history_messages"], say), outcome


def _latest(state: State) -> str:
    return str(state["history_audio"][-1][0]) if state["history_audio"] else ""


def _paragraph(sentence: str) -> str:
    return f"<p role='status'>{html.escape(sentence)}</p>"
