"""The middleware for all HTTP requests: open responses, uploads, heartbeats and size limits."""

from __future__ import annotations

import asyncio
import html
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anyio import to_thread
from gradio.route_utils import API_PREFIX
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...units import readable_bytes
from ..shared.language import preferred
from ..speech.recordings import UNDER_WAY, DiskFull
from .bodies import announced_bytes, drop_body, read_at_most
from .cross_origin import NAMED_ORIGIN
from .heartbeats import LOST, Heartbeats
from .layers import http_layer
from .permissions import from_another_site
from .session_limits import CALL, DATA, PAGE_HEARTBEAT, session_of

logger = logging.getLogger(__name__)

_UPLOAD = f"{API_PREFIX}/upload"
_ENVELOPE_BYTES = 10_000
"""Allowance for the form around an uploaded file."""
_STATIC_FOLDERS = ("/assets/", "/static/", "/svelte/", "/docs/static/")
_STATIC_FILES = {"/theme.css", f"{API_PREFIX}/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"}
_OTHER_SITE = (
    "其他网站的页面不能使用本页面。如果这就是本站：请让反向代理发送请求头 Host 或 X-Forwarded-Host"
    "（nginx：proxy_set_header Host $http_host;），或在启动时用 --root-path 给出页面的完整地址。",
    "Pages of other sites may not use this one. If this is its own site: have the proxy send the header Host or "
    "X-Forwarded-Host (nginx: proxy_set_header Host $http_host;), or start the app with --root-path and the whole "
    "address of the page.",
)
_FULL = (
    "The server cannot keep the recording ({reason}): free space in its --tmp-dir, then try again. / "
    "服务器无法保存录音（{reason}）：请清理 --tmp-dir 所在磁盘后重试。"
)
_TOO_LARGE = (
    "The request is larger than {size}: upload recordings as files, and shorten the texts. / "
    "请求超过 {size}：录音请以文件上传，并缩短文本。"
)
_RESULTS = (f"{API_PREFIX}/queue/", CALL, f"{API_PREFIX}/file=", "/v1/audio/")
"""Routes that deliver results: Gradio's event streams, the recordings that these name, and the speech API."""
UPLOADS = "/v1/audio/"
"""Paths of the speech API that receive recordings."""
_LINE_CUT_S = 20.0
"""Timeout after the result stream of a session with waiting requests is closed.

Enough for a reload on a slow network; until then, requests of closed pages delay others.
"""
_QUIET_S = 1.0
"""Time after a response in which its client may fetch the recordings that it names."""
_POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'"
"""Content security policy of pages: no content of other sites, no frames of other sites around it (clickjacking)."""
_REFUSAL_PAGE = """<!doctype html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{code}</title>
<body style="font: 16px/1.6 system-ui, sans-serif; max-width: 40em; margin: 3em auto; padding: 0 1em">
<p role="alert">⚠️ {sentence}</p>
"""


@dataclass(eq=False)
class RequestMiddleware:
    """`around` is a layer. Uploads are written to ``folder``, as ``tmp...`` until they are complete.

    ``heartbeats`` receives heartbeats and open streams. Callbacks in other threads: ``upload_begins`` at the start of a
    permitted upload; ``answers_end`` with a session and the seconds since its result stream closed, again as long as
    it returns True (requests still wait); ``reserved`` as the context manager around an upload of so many bytes.
    ``know`` returns whether the session of a heartbeat is known. Larger uploads, or other bodies, are refused.
    """

    folder: Path
    heartbeats: Heartbeats
    upload_begins: Callable[[], object] = lambda: None
    answers_end: Callable[[str, float], bool] = lambda session, for_s: False
    largest_upload_bytes: float = math.inf
    largest_body_bytes: float = 1 << 20
    know: Callable[[str], bool] = lambda session: True
    reserved: Callable[[float], AbstractContextManager[object]] = nullcontext

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way = 0
        self._last_s = -math.inf
        self._uploads = 0
        self._result_streams = Heartbeats(
            lambda session: None, lambda session: self.answers_end(session, _LINE_CUT_S), _LINE_CUT_S
        )

    @http_layer
    async def around(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        path, request = scope["path"], HTTPConnection(scope)
        reads = scope["method"] in ("GET", "HEAD")
        # Links from other sites are permitted, requests of their scripts and forms are not. Browsers send Origin for
        # scripts and fonts of this site, too.
        is_static = reads and (path in _STATIC_FILES or path.startswith(_STATIC_FOLDERS))
        named = scope.get(NAMED_ORIGIN, False)
        if (not reads or "origin" in request.headers) and not (is_static or named) and from_another_site(request):
            await _refusal(request, 403, *_OTHER_SITE)(scope, receive, send)
        elif path.startswith(PAGE_HEARTBEAT):
            await self._heartbeat(request, path[len(PAGE_HEARTBEAT) :])(scope, receive, send)
        elif path == _UPLOAD and scope["method"] == "POST":
            limit_bytes = self.largest_upload_bytes
            upload = partial(self._upload, app)
            await read_at_most(limit_bytes + _ENVELOPE_BYTES, too_large(limit_bytes), upload, scope, receive, send)
        elif path.startswith(UPLOADS) and scope["method"] == "POST":
            limit_bytes = self.largest_upload_bytes
            answer, most_bytes = partial(self._answer, app), limit_bytes * 4 / 3 + _ENVELOPE_BYTES  # for base64
            await read_at_most(most_bytes, too_large(limit_bytes), answer, scope, receive, send)
        else:
            refusal = _TOO_LARGE.format(size=readable_bytes(int(self.largest_body_bytes)))
            answer = partial(self._answer, app)
            await read_at_most(self.largest_body_bytes, refusal, answer, scope, receive, _with_policy(send))

    def _heartbeat(self, request: HTTPConnection, session: str) -> Response:
        known = self.know(session)
        if known or session in self.heartbeats:  # unknown sessions would let clients fill the table
            self.heartbeats.beat(session)
        if known:
            return Response(status_code=204)
        return PlainTextResponse(preferred(request.headers.get("accept-language"))(*LOST), 410)

    async def _answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        with ExitStack() as until_answered:
            if session := session_of(scope):
                until_answered.enter_context(self.heartbeats.stream(session))
            if path == DATA and session:
                until_answered.enter_context(self._result_streams.stream(session))
            if path.startswith(_RESULTS):
                until_answered.enter_context(self._counted())
            await app(scope, receive, send)

    async def _upload(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        begun, answered, room = False, False, ExitStack()

        async def begins() -> Message:
            nonlocal begun
            if not begun:  # not earlier: a refused upload, for example without a login, is not read
                begun = True
                most_bytes = self.largest_upload_bytes if self.largest_upload_bytes < math.inf else 0
                announced = announced_bytes(scope)
                reserved = self.reserved(most_bytes if announced is None else announced)
                await to_thread.run_sync(room.enter_context, reserved)
                asyncio.get_running_loop().run_in_executor(None, self.upload_begins)
            return await receive()

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        self._uploads += 1
        try:
            await app(scope, begins, noted)
        except ClientDisconnect:
            logger.debug("The client aborted an upload")
        except DiskFull as full:
            await drop_body(receive)
            await PlainTextResponse(str(full), 507)(scope, receive, send)
        except OSError as error:
            logger.error("Saving an upload failed: %s", error)
            if answered:
                raise
            await PlainTextResponse(_FULL.format(reason=error.strerror), 507)(scope, receive, send)
        finally:
            self._uploads -= 1
            await to_thread.run_sync(room.close)
            if not self._uploads:  # then the remaining files are from aborted uploads
                await to_thread.run_sync(self._sweep)

    def _sweep(self) -> None:
        for left in self.folder.glob(f"{UNDER_WAY}*"):
            if left.is_file() and not self._uploads:
                left.unlink(missing_ok=True)

    def wait_until_quiet(self, within_s: float) -> bool:
        """Waits until all results are delivered; returns False after ``within_s``."""
        until_s = time.monotonic() + within_s
        with self._changed:
            while (now_s := time.monotonic()) < until_s:
                quiet_in_s = math.inf if self._under_way else self._last_s + _QUIET_S - now_s
                if quiet_in_s <= 0:
                    return True
                self._changed.wait(min(quiet_in_s, until_s - now_s))
        return False

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._count(+1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, step: int) -> None:
        with self._changed:
            self._under_way += step
            self._last_s = time.monotonic()
            self._changed.notify_all()


def too_large(limit_bytes: float) -> str:
    """Returns the message for an upload beyond the limit."""
    size = readable_bytes(int(limit_bytes))
    return (
        f"The recording is larger than {size}: cut it, save it as FLAC or MP3, or start the app with a larger "
        f"--max-upload. / 录音超过 {size}：请裁剪、另存为 FLAC 或 MP3，或启动时调大 --max-upload。"
    )


def _refusal(request: HTTPConnection, code: int, zh: str, en: str) -> Response:
    """Returns the sentence as an HTML page for browsers, as plain text for programs."""
    sentence = preferred(request.headers.get("accept-language"))(zh, en)
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(_REFUSAL_PAGE.format(code=code, sentence=html.escape(sentence)), code)
    return PlainTextResponse(sentence, code)


def _with_policy(send: Send) -> Send:
    """Adds the `_POLICY` to pages."""

    async def with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if headers.get("content-type", "").startswith("text/html"):
                headers["Content-Security-Policy"] = _POLICY
        await send(message)

    return with_policy
