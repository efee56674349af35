"""The whole page and its server. Makes no requests to the internet."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from gradio.tunneling import CURRENT_TUNNELS
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp

from .api import control, endpoints
from .editx_tab import EditxTab
from .server import address_hint, gradio_routes, locale, session_limits
from .server.bodies import small_bodies_first
from .server.connections import affordable
from .server.heartbeats import Heartbeats
from .server.hosts import Hosts
from .server.logins import Logins, tells_of_the_limit
from .server.middleware import RequestMiddleware
from .server.permissions import Permissions
from .server.root_path import beneath
from .server.server import BoundedServer
from .server.session_requests import SessionRequests
from .shared.gradio_compat import (
    Blocks,
    keep_uploads_in,
    leave_out_the_internet,
    listening,
    set_closed,
    sign_out,
    supported,
    take_no_empty_session,
    user,
)
from .shared.protocols import Manager
from .ui.labels import label, translations

_SWEEP_EVERY_S = 600
_BODY_BYTES, _BYTES_PER_CHARACTER = 1 << 20, 2 * 12
"""Limit of bodies other than uploads: two texts with each character as JSON escapes, and paths of recordings."""
_CACHE_CHECK_S, _CACHE_AGE_S = 3600, 24 * 3600
_CLOSE_WITHIN_S = 1
_LOOK_EVERY_S, _TELL_EVERY_S = 0.05, 0.1
_CSS = """
:is(.said, .progress-line):has(.prose:empty) {display: none}
.said p, .progress-line label {margin: 0; overflow-wrap: anywhere; line-height: 1.5}
.said p {scroll-margin: 140px 0 24px}
.said p[role=alert] {color: var(--error-text-color); font-weight: 500}
.progress-line label {display: block}
.progress-line progress {
  appearance: none; display: block; width: 100%; height: 8px; margin-top: 4px;
  border: 0; border-radius: 4px; overflow: hidden; background: rgba(128, 128, 128, .25)
}
.progress-line progress::-webkit-progress-bar {background: transparent}
.progress-line progress::-webkit-progress-value {background: var(--color-accent)}
.progress-line progress::-moz-progress-bar {background: var(--color-accent)}
/* Where nobody knows how much is done. */
.progress-line progress:indeterminate::-moz-progress-bar {background: transparent}
.progress-line progress:indeterminate {
  background: linear-gradient(90deg, transparent 40%, var(--color-accent) 50%, transparent 60%) 0 / 300%, #8884;
  animation: under-way 2s linear infinite
}
@keyframes under-way {from {background-position: 100%} to {background-position: 0}}
body:not(:has(#progress [data-running])) #stop {display: none}
#progress {scroll-margin: 5em 0}
:is(.progress-line, .said) .wrap:has(> .error) {display: none}
/* What was said about a recording that was taken away. */
body:not(:has(#prompt-audio :is(audio, .waveform-container))) #hearing {display: none}
#history .download-link ~ button, #follow-request, #prewarm {display: none}
/* The players of Gradio 6, and those of Gradio 5, whose waves are 128 pixels high. */
#history .waveform-wrapper, #history .waveform {height: 40px; display: flex; align-items: center; overflow: hidden}
#history .waveform-wrapper > div, #history .waveform > div {flex: 1 0 100%}
#history .waveform > div {transform: scaleY(.32)}
#prompt-audio .wrap {min-height: 8rem}
#task-line {opacity: .75}
/* On a phone a name is as long as its box. */
:is(#task, #sub-task) input {text-overflow: ellipsis; margin-right: 1.4em}
footer .divider:last-child {display: none}
@media (max-width: 640px) {#history {height: auto !important; min-height: 220px}}
#history .bot-row {scroll-margin: 24px 0 60px}
"""
_FONT = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")


class Page:
    """Gradio's page around an `EditxTab`, with GPU endpoints if there is a manager."""

    def __init__(
        self,
        tab: EditxTab,
        manager: Manager | None = None,
        permissions: Permissions | None = None,
        largest_upload_bytes: int | None = None,
    ) -> None:
        self.speech = tab.speech
        self._largest_upload_bytes = largest_upload_bytes
        self._recordings, self._page_sessions = tab.recordings, tab.page_sessions
        self._ended = threading.Event()
        self._asks_for_password = False
        #: Whether the page is ready, which is later than the server's first response.
        self.serves = False
        keep_uploads_in(str(tab.speech.folder))
        leave_out_the_internet()
        presence = Heartbeats(self._session_begins, self._session_ends)
        tab.recordings.silent = presence.silent
        self.traffic = RequestMiddleware(
            str(tab.speech.folder),
            presence,
            tab.prewarm.show if tab.prewarm else None,
            tab.waiting.cancel_waiting,
            math.inf if largest_upload_bytes is None else largest_upload_bytes,
            _BODY_BYTES + _BYTES_PER_CHARACTER * tab.speech.limits.text,
            self._page_sessions.knows,
            tab.recordings.reserved,
        )
        look: dict[str, Any] = {"theme": gr.themes.Soft(font=_FONT), "css": _CSS}
        self._look = supported(gr.Blocks.launch, **look)
        # Gradio 5 takes theme and CSS in Blocks() instead of launch().
        with Blocks(
            title="Step-Audio-EditX",
            analytics_enabled=False,
            delete_cache=(_CACHE_CHECK_S, _CACHE_AGE_S),
            **({} if self._look else look),
        ) as self.blocks:
            gr.Markdown("## 🎙️ Step-Audio-EditX")
            gr.Markdown(label("音色克隆与语音编辑", "Zero-shot voice cloning and audio editing"))
            tab.register_components()
            tab.register_events()
            tab.register_restore(tab.page_sessions.register(self.blocks, tab.state, tab.chat_box, tab.line))
            endpoints.register_speech(tab.speech, tab.watched, tab.recordings)
            if manager is not None:
                endpoints.register_gpu(manager, permissions or Permissions())
        take_no_empty_session(self.blocks)

    def serve(
        self,
        host: str,
        port: int,
        *,
        share: bool = False,
        api: ASGIApp | None = None,
        auth: tuple[str, str] | None = None,
        hosts: Hosts | None = None,
        root_path: str = "",
        ssl_certfile: str | None = None,
        ssl_keyfile: str | None = None,
    ) -> str | None:
        """Starts serving in the background; returns the public link if ``share`` is set and a tunnel could be opened.

        ``api`` serves the paths of `control`; ``auth`` is the name and password of the page, which protects all reads,
        so that ``hosts`` is not applied. ``root_path`` is the path or URL under which a proxy serves the page;
        ``ssl_certfile`` and ``ssl_keyfile`` are PEM files for https. Raises OSError if the port is in use.
        """
        hosts = hosts or Hosts()
        self._asks_for_password = auth is not None
        session_limits.bound_names()
        session_limits.bound_uploads()
        with listening((lambda app: app) if auth else hosts.around, BoundedServer):
            _, _, public_link = self.blocks.launch(
                server_name=host,
                server_port=port,
                share=share,
                auth=auth,
                root_path=root_path,
                ssl_certfile=ssl_certfile,
                ssl_keyfile=ssl_keyfile,
                ssl_verify=False,  # for Gradio's first request to itself: the certificate has another name
                max_file_size=self._largest_upload_bytes,
                prevent_thread_lock=True,
                quiet=True,
                state_session_capacity=session_limits.SESSIONS,
                ssr_mode=False,
                app_kwargs={
                    "middleware": [Middleware(around) for around in self._middleware(root_path, api)],
                    "exception_handlers": gradio_routes.HANDLERS,
                    "redirect_slashes": False,
                },
                i18n=translations(),
                **self._look,
                **supported(gr.Blocks.launch, footer_links=["api"], run_history=False),
            )
        if public_link:
            hosts.allow(urlsplit(public_link).hostname or "")
        self.serves = True
        threading.Thread(target=self._sweep, name="recordings-sweeper", daemon=True).start()
        session_limits.bound_queue(self.blocks._queue)
        # Gradio polls its queue a thousand times a second, which uses 3 % of a core.
        self.blocks._queue.sleep_when_free = _LOOK_EVERY_S
        self.blocks._queue.progress_update_sleep_when_free = _TELL_EVERY_S
        return public_link or None

    def _middleware(self, root_path: str, api: ASGIApp | None) -> list[Callable[[ASGIApp], ASGIApp]]:
        """Returns the middleware around Gradio's application, the outermost first."""
        auth = self._asks_for_password
        logins = Logins(lambda request: sign_out(self.blocks.app, request))
        lines = SessionRequests(self._may_stay, affordable() // 2)  # the other half is for short requests
        return [
            beneath(root_path),
            small_bodies_first,
            lines.around,
            self.traffic.around,
            *([logins.around, tells_of_the_limit] if auth else []),
            address_hint.around,
            locale.around,
            gradio_routes.without(() if auth else ("/login", "/logout")),
            *([control.beside(api)] if api else []),
        ]

    def signed_in(self, request: HTTPConnection) -> str | None:
        """Returns the name of the signed-in user, or None."""
        return user(self.blocks.app, request)

    def _may_stay(self, request: HTTPConnection) -> bool:
        return not self._asks_for_password or self.signed_in(request) is not None

    def _session_begins(self, session: str) -> None:
        self._recordings.begin(session)
        set_closed(self.blocks, session, False)

    def _session_ends(self, session: str) -> None:
        self._recordings.end(session)
        self._page_sessions.end(session)
        set_closed(self.blocks, session, True)

    def _sweep(self) -> None:
        while not self._ended.wait(_SWEEP_EVERY_S):
            self._recordings.sweep()
            session_limits.forget_deleted_files(self.blocks)

    def refuse(self) -> None:
        """Refuses new requests with `ShuttingDown`, and removes Gradio's concurrency limits, so that none waits."""
        self.speech.close()
        for function in self.blocks.fns.values():
            function.concurrency_limit = None
        for queue in list(self.blocks._queue.event_queue_per_concurrency_id.values()):
            queue.concurrency_limit = None

    def close_tunnels(self) -> None:
        """Closes the public link."""
        for tunnel in list(CURRENT_TUNNELS):
            tunnel.kill()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Stops serving, closes the public link and deletes this page's files from Gradio's cache."""
        self._ended.set()
        self.close_tunnels()
        if self.blocks.is_running:
            # Open pages keep a connection each.
            self.blocks.server.config.timeout_graceful_shutdown = _CLOSE_WITHIN_S
        self.blocks.close(verbose=False)
