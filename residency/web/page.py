"""The page as a whole, and the server that shows it. Nothing here loads from or reports to the internet."""

from __future__ import annotations

import math
import threading
from typing import Any

import gradio as gr
from gradio.tunneling import CURRENT_TUNNELS
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp

from . import bounds, control, endpoints, locale
from .bodies import small_bodies_first
from .compat import (
    Blocks,
    answer_no_other_sites,
    keep_uploads_in,
    leave_out_the_internet,
    serve_with,
    set_closed,
    supported,
    user,
)
from .connections import affordable
from .editx_tab import EditxTab
from .guard import Guard
from .labels import label, translations
from .lines import Lines
from .presence import Presence
from .protocols import Manager
from .server import BoundedServer
from .traffic import Traffic

_SWEEP_EVERY_S = 600
_BODY_BYTES, _BYTES_PER_CHARACTER = 1 << 20, 2 * 12
"""Of a request that is no upload: recordings are only named in it, two texts may be, each character as JSON escapes."""
_CACHE_CHECK_S, _CACHE_AGE_S = 3600, 24 * 3600
_CLOSE_WITHIN_S = 1
_LOOK_EVERY_S, _TELL_EVERY_S = 0.05, 0.1
_CSS = """
#message:has(.prose:empty), #not-known:has(p:empty) {display: none}
/* There it says what has gone wrong; Gradio's bare "Error" would only cover what is left. */
body:has(#not-known p:not(:empty)) :is(#history, #message) .wrap:has(> .error) {display: none}
#history .download-link ~ button, #hear-the-end {display: none}
/* The last line is Gradio's percentage, which for a place in a queue or unknown work would be 0. */
:is(#history, #prompt-text) .progress-level-inner {
  white-space: pre-line; text-align: center; overflow-wrap: anywhere; padding: 0 8px;
  line-height: 1.5em; margin-bottom: -.5em; clip-path: inset(0 0 1.5em 0)
}
:is(#history, #prompt-text) .progress-bar-wrap {overflow: hidden}
/* Nobody knows how much is done. */
:is(#history, #prompt-text) .progress-bar[style*="width: 0%"] {
  width: 30% !important; animation: at-work 1.2s ease-in-out infinite alternate
}
@keyframes at-work {from {transform: translateX(0)} to {transform: translateX(233%)}}
/* The players of Gradio 6, and those of Gradio 5, whose waves are 128 pixels high. */
#history .waveform-wrapper, #history .waveform {height: 40px; display: flex; align-items: center; overflow: hidden}
#history .waveform-wrapper > div, #history .waveform > div {flex: 1 0 100%}
#history .waveform > div {transform: scaleY(.32)}
footer .divider:last-child {display: none}
@media (max-width: 640px) {#history {height: auto !important; min-height: 220px}}
"""
_FONT = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")


class Page:
    """Gradio's page around an `EditxTab`. With a manager it has the GPU endpoints too."""

    def __init__(
        self,
        tab: EditxTab,
        manager: Manager | None = None,
        guard: Guard | None = None,
        largest_upload_bytes: int | None = None,
    ) -> None:
        self.speech = tab.speech
        self._largest_upload_bytes = largest_upload_bytes
        self._recordings, self._visits = tab.recordings, tab.visits
        self._ended = threading.Event()
        self._asks_for_password = False
        #: Whether the page answers, which is later than the server's first answer.
        self.serves = False
        keep_uploads_in(str(tab.speech.folder))
        leave_out_the_internet()
        self.traffic = Traffic(
            str(tab.speech.folder),
            Presence(self._session_begins, self._session_ends),
            tab.intent.show if tab.intent else None,
            tab.waiting.gone,
            math.inf if largest_upload_bytes is None else largest_upload_bytes,
            _BODY_BYTES + _BYTES_PER_CHARACTER * tab.speech.limits.text,
            self._visits.know,
        )
        look: dict[str, Any] = {"theme": gr.themes.Soft(font=_FONT), "css": _CSS}
        self._look = supported(gr.Blocks.launch, **look)
        # Where launch() does not take the look, Blocks() does.
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
            tab.visits.register(self.blocks, tab.state, tab.chat_box, tab.message)
            endpoints.register_speech(tab.speech, tab.told, tab.recordings, tab.engine_event)
            if manager is not None:
                endpoints.register_gpu(manager, guard or Guard())

    def serve(
        self,
        host: str,
        port: int,
        *,
        share: bool = False,
        api: ASGIApp | None = None,
        auth: tuple[str, str] | None = None,
    ) -> str | None:
        """Start serving in the background and return the public link, if one was asked for and could be had.

        ``api`` has the paths of `control`; ``auth`` is the name and the password that the page asks for. OSError if
        the port is taken.
        """
        self._asks_for_password = auth is not None
        serve_with(BoundedServer)
        bounds.bound_names()
        bounds.bound_uploads()
        lines = Lines(self._may_stay, affordable() // 2)  # the rest is for requests that end
        middleware = [
            small_bodies_first,
            lines.around,
            self.traffic.around,
            locale.around,
            *([control.beside(api)] if api else []),
        ]
        _, _, public_link = self.blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=auth,
            max_file_size=self._largest_upload_bytes,
            prevent_thread_lock=True,
            quiet=True,
            state_session_capacity=bounds.SESSIONS,
            ssr_mode=False,
            app_kwargs={"middleware": [Middleware(around) for around in middleware]},
            i18n=translations(),
            **self._look,
            **supported(gr.Blocks.launch, footer_links=["api"], run_history=False),
        )
        answer_no_other_sites(self.blocks.app)
        self.serves = True
        threading.Thread(target=self._sweep, name="recordings-sweeper", daemon=True).start()
        bounds.bound_queue(self.blocks._queue)
        # Gradio looks for events a thousand times a second, which takes 3 % of a core for ever.
        self.blocks._queue.sleep_when_free = _LOOK_EVERY_S
        self.blocks._queue.progress_update_sleep_when_free = _TELL_EVERY_S
        return public_link or None

    def signed_in(self, request: HTTPConnection) -> str | None:
        """Who sends this, if the page has asked them for a password."""
        return user(self.blocks.app, request)

    def _may_stay(self, request: HTTPConnection) -> bool:
        return not self._asks_for_password or self.signed_in(request) is not None

    def _session_begins(self, session: str) -> None:
        self._recordings.begin(session)
        set_closed(self.blocks, session, False)

    def _session_ends(self, session: str) -> None:
        self._recordings.end(session)
        self._visits.end(session)
        set_closed(self.blocks, session, True)

    def _sweep(self) -> None:
        while not self._ended.wait(_SWEEP_EVERY_S):
            self._recordings.sweep()
            bounds.forget_deleted_files(self.blocks)

    def refuse(self) -> None:
        """Answer new requests with `ShuttingDown`. At once: none waits in Gradio's queue for another's end."""
        self.speech.close()
        for function in self.blocks.fns.values():
            function.concurrency_limit = None
        for queue in list(self.blocks._queue.event_queue_per_concurrency_id.values()):
            queue.concurrency_limit = None

    def close_tunnels(self) -> None:
        """Take down the public link."""
        for tunnel in list(CURRENT_TUNNELS):
            tunnel.kill()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Stop serving, take down the public link and delete what this page has put into Gradio's cache."""
        self._ended.set()
        self.close_tunnels()
        if self.blocks.is_running:
            # Open pages hold a connection each, for as long as they are open.
            self.blocks.server.config.timeout_graceful_shutdown = _CLOSE_WITHIN_S
        self.blocks.close(verbose=False)
