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
from .messages import Message, MessagePlaces
from .page_requests import PageRequests
from .waiting import WaitingRequests

HEARTBEAT_EVERY_S = 5.0
"""Interval of the heartbeat of an open page."""

_AT_MOST = 1000
_RUNNING = ".running"


class PageSessions:
    """Sessions by a secret, which the page stores and sends after a reload. Thread-safe."""

    def __init__(
        self, requests: PageRequests, recordings: Recordings, waiting: WaitingRequests, places: MessagePlaces
    ) -> None:
        self._requests, self._recordings, self._waiting, self._places = requests, recordings, waiting, places
        self._lock = threading.Lock()
        self._sessions: dict[str, tuple[str, SessionState]] = {}  # ordered by the latest heartbeat

    def register(self, page: gr.Blocks, state: gr.State, chat: gr.Chatbot, line: gr.HTML) -> Any:
        """Connects the components while the page is drawn. The server must serve the path of ``heartbeat.js``.

        Returns the event after which the session of a reloaded page continues.
        """
        identity, losable = gr.Textbox(visible=False), gr.Textbox(visible=False)
        heartbeat = static.text("heartbeat.js").replace("EVERY_MS", str(HEARTBEAT_EVERY_S * 1000))
        stored = static.calling("saved_inputs.js", "[...secrets(), values[2]]")
        hidden: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
        # Clicked by heartbeat.js. Hidden by CSS, since Gradio does not draw invisible components.
        follow = gr.Button(elem_id="follow-request")
        messages = self._places.components
        inputs, outputs = [identity, losable, state], [identity, state, chat, *messages]
        continued = page.load(self._start, inputs, outputs, js=stored, queue=False, **hidden)
        continued.then(None, identity, js=heartbeat, **PRIVATE)
        follow.click(self._requests.follow, state, [chat, line, *messages], concurrency_limit=None, **hidden)
        return continued

    def knows(self, session: str) -> bool:
        """Whether this process has drawn a page of this session, and the session has not ended."""
        with self._lock:
            secret = next((secret for secret, (name, _) in self._sessions.items() if name == session), None)
            if secret is not None:
                self._sessions[secret] = self._sessions.pop(secret)
            return secret is not None

    def end(self, session: str) -> None:
        with self._lock:
            self._sessions = {secret: each for secret, each in self._sessions.items() if each[0] != session}

    def _start(self, stored: str | None, losable: str | None, state: SessionState) -> list[Any]:
        """Starts a session, or continues one whose secret is known.

        ``stored`` has the secrets of this page and of earlier ones, the newest first; ``losable`` is empty if the page
        has nothing on the server to lose.
        """
        name = session() or ""
        secret, *earlier = (stored or "")[:200].split() or [secrets.token_hex(16)]
        identity = f"{name}.{secret}"
        with self._lock:
            # Its own secret first: a browser may send the request twice.
            known = (self._sessions.pop(each) for each in (secret, *earlier) if each in self._sessions)
            before, state = next(known, (None, state))
            self._sessions[secret] = (name, state)
            if len(self._sessions) > _AT_MOST:
                del self._sessions[next(iter(self._sessions))]
        if before is None:
            message = Message.status(f"⚠️ {localizer()(*LOST)}") if earlier and losable else ""
            return [identity, state, gr.skip(), *self._messages(message)]
        if before != name:
            self._recordings.inherit(before, name)
            self._waiting.inherit(before, name)
        localize = localizer()
        chat, message = as_messages(state["history_messages"], localize), state["message"]
        if self._requests.latest(state) is not None:
            identity += _RUNNING
            message = Message.status(localize("先前的请求仍在进行…", "Your earlier request is still running…"))
        return [identity, state, chat, *self._messages(message)]

    def _messages(self, message: str) -> list[Any]:
        """Returns updates of the messages. Without one, clears nothing: a press may have ended before."""
        return self._places.values(message) if message else self._places.unchanged()
