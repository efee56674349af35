"""Transfers the history and the running request of a session to the new session of a reloaded page."""

from __future__ import annotations

import secrets
import threading
from typing import Any

import gradio as gr

from .. import static
from ..server.heartbeats import LOST
from ..shared.gradio_compat import PRIVATE, localizer, session
from ..speech.recordings import Recordings
from .chat_history import SessionState, as_messages
from .messages import MessagePlaces
from .page_requests import PageRequests
from .waiting import WaitingRequests

TELL_EVERY_S = 5.0
"""Interval of the heartbeat of an open page."""

_AT_MOST = 1000
_GOES_ON = ".goes-on"


class PageSessions:
    """Sessions by a secret, which the page stores and sends after a reload. Thread-safe."""

    def __init__(
        self, requests: PageRequests, recordings: Recordings, waiting: WaitingRequests, places: MessagePlaces
    ) -> None:
        self._requests, self._recordings, self._waiting, self._places = requests, recordings, waiting, places
        self._lock = threading.Lock()
        self._visits: dict[str, tuple[str, SessionState]] = {}  # ordered by the latest heartbeat

    def register(self, page: gr.Blocks, state: gr.State, chat: gr.Chatbot, line: gr.HTML) -> Any:
        """Connects the components while the page is drawn. The server must serve the path of ``heartbeat.js``.

        Returns the event after which a visit continues.
        """
        visit, to_lose = gr.Textbox(visible=False), gr.Textbox(visible=False)
        script = static.text("heartbeat.js")
        secrets = static.calling("saved_inputs.js", "[...secrets(), values[2]]")
        hidden: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
        # Clicked by heartbeat.js. Hidden by CSS, since Gradio does not draw invisible components.
        hear_the_end = gr.Button(elem_id="hear-the-end")
        messages = self._places.components
        inputs, outputs = [visit, to_lose, state], [visit, state, chat, *messages]
        came = page.load(self._come, inputs, outputs, js=secrets, queue=False, **hidden)
        came.then(None, visit, js=script.replace("EVERY_MS", str(TELL_EVERY_S * 1000)), **PRIVATE)
        hear_the_end.click(self._requests.follow, state, [chat, line, *messages], concurrency_limit=None, **hidden)
        return came

    def know(self, session: str) -> bool:
        """Whether this process has drawn a page of this session, and the session has not ended."""
        with self._lock:
            visit = next((visit for visit, (whose, _) in self._visits.items() if whose == session), None)
            if visit is not None:
                self._visits[visit] = self._visits.pop(visit)
            return visit is not None

    def end(self, whose: str) -> None:
        """Deletes the visit of an ended session."""
        with self._lock:
            self._visits = {visit: who for visit, who in self._visits.items() if who[0] != whose}

    def _come(self, known: str | None, to_lose: str | None, state: SessionState) -> list[Any]:
        """Starts a visit. ``known`` has the secrets of the new visit and of earlier ones, the newest first."""
        whose = session() or ""
        secret, *earlier = (known or "")[:200].split() or [secrets.token_hex(16)]
        visit = f"{whose}.{secret}"
        with self._lock:
            before, state = next((self._visits.pop(each) for each in earlier if each in self._visits), (None, state))
            self._visits[secret] = (whose, state)
            if len(self._visits) > _AT_MOST:
                del self._visits[next(iter(self._visits))]
        if before is None:
            news = _status(f"⚠️ {localizer()(*LOST)}") if earlier and to_lose else ""
            return [visit, state, gr.skip(), *self._places.values(news)]
        self._recordings.inherit(before, whose)
        self._waiting.inherit(before, whose)
        goes_on, localize = self._requests.latest(state) is not None, localizer()
        shown, news = as_messages(state["history_messages"], localize), state["message"]
        if goes_on:
            visit += _GOES_ON
            news = _status(localize("先前的请求仍在进行…", "What you asked for before goes on…"))
        return [visit, state, shown, *self._places.values(news)]


def _status(sentence: str) -> str:
    return f"<p role='status'>{sentence}</p>"
