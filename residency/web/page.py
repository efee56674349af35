"""The whole page and its server. Makes no requests to the internet."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from fastapi import FastAPI
from gradio.tunneling import CURRENT_TUNNELS
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp

from . import static
from .api import control, endpoints
from .editx_tab import EditxTab
from .server import gradio_routes, session_limits
from .server.connections import affordable
from .server.cross_origin import cross_origin
from .server.heartbeats import Heartbeats
from .server.hosts import Hosts
from .server.layers import beneath
from .server.logins import Logins
from .server.middleware import RequestMiddleware
from .server.permissions import Permissions
from .server.server import listening
from .shared.gradio_compat import (
    Blocks,
    adapt_page_templates,
    keep_uploads_in,
    set_closed,
    sign_out,
    supported,
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
_FONT = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")


def _script(name: str) -> str:
    return f"<script>\n{{% raw %}}{static.text(name)}{{% endraw %}}</script>"


_LOGIN = "{% if config['auth_required'] %}" + _script("login.js") + "{% endif %}"
_HEAD = _LOGIN + _script("language.js") + _script("address.js")
"""Scripts that the browser runs before all others."""


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
        #: Whether the page is ready, which is later than the server's first response.
        self.serves = False
        keep_uploads_in(str(tab.speech.folder))
        adapt_page_templates(_HEAD)
        heartbeats = Heartbeats(self._session_begins, self._session_ends)
        tab.recordings.silent = heartbeats.silent
        self.middleware = RequestMiddleware(
            tab.speech.folder,
            heartbeats,
            tab.prewarm.show if tab.prewarm else lambda: None,
            tab.waiting.cancel_waiting,
            math.inf if largest_upload_bytes is None else largest_upload_bytes,
            _BODY_BYTES + _BYTES_PER_CHARACTER * tab.speech.limits.text,
            self._page_sessions.knows,
            tab.recordings.reserved,
        )
        look: dict[str, Any] = {"theme": gr.themes.Soft(font=_FONT), "css": static.text("page.css")}
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

    def serve(
        self,
        host: str,
        port: int,
        *,
        api: FastAPI | None = None,
        origins: Sequence[str] = (),
        auth: tuple[str, str] | None = None,
        hosts: Hosts | None = None,
        root_path: str = "",
        **launch: Any,
    ) -> str | None:
        """Starts serving in the background; returns the public link if ``share`` is set and a tunnel could be opened.

        ``api`` serves its own paths, those under ``/v1`` also to pages of the sites ``origins``. ``auth`` is the name
        and password of the page, which protects all reads,
        so that ``hosts`` is not applied. ``root_path`` is the path or URL under which a proxy serves the page; further
        arguments are those of `gr.Blocks.launch`. Raises OSError if the port is in use.
        """
        hosts = hosts or Hosts()
        session_limits.limit_names()
        session_limits.limit_uploads()
        layers = self._layers(root_path, api, origins, auth is not None)
        with listening((lambda app: app) if auth else hosts.around):
            _, _, public_link = self.blocks.launch(
                server_name=host,
                server_port=port,
                auth=auth,
                root_path=root_path,
                ssl_verify=False,  # for Gradio's first request to itself: the certificate has another name
                max_file_size=self._largest_upload_bytes,
                prevent_thread_lock=True,
                quiet=True,
                state_session_capacity=session_limits.SESSIONS,
                ssr_mode=False,
                app_kwargs={
                    "middleware": [Middleware(around) for around in layers],
                    "exception_handlers": gradio_routes.HANDLERS,
                    "redirect_slashes": False,
                },
                i18n=translations(),
                **launch,
                **self._look,
                **supported(gr.Blocks.launch, footer_links=["api"], run_history=False),
            )
        if public_link:
            hosts.allow(urlsplit(public_link).hostname or "")
        self.serves = True
        threading.Thread(target=self._sweep, name="recordings-sweeper", daemon=True).start()
        session_limits.limit_queue(self.blocks._queue)
        # Gradio polls its queue a thousand times a second, which uses 3 % of a core.
        self.blocks._queue.sleep_when_free = _LOOK_EVERY_S
        self.blocks._queue.progress_update_sleep_when_free = _TELL_EVERY_S
        return public_link or None

    def _layers(
        self, root_path: str, api: FastAPI | None, origins: Sequence[str], auth: bool
    ) -> list[Callable[[ASGIApp], ASGIApp]]:
        """Returns the layers around Gradio's application, the outermost first."""
        logins = Logins(lambda request: sign_out(self.blocks.app, request))
        may_stay = (lambda request: self.signed_in(request) is not None) if auth else (lambda request: True)
        return [
            beneath(root_path),
            session_limits.session_requests(may_stay, affordable() // 2),  # the other half is for short requests
            cross_origin(origins),
            self.middleware.around,
            *([logins.around] if auth else []),
            gradio_routes.without(() if auth else ("/login", "/logout")),
            *([control.route_to(api)] if api else []),
        ]

    def signed_in(self, request: HTTPConnection) -> str | None:
        """Returns the name of the signed-in user, or None."""
        return user(self.blocks.app, request)

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
