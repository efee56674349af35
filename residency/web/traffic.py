"""Looks at the HTTP requests that pass by: answers on their way, uploads, and pages that come and go."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from anyio import to_thread
from starlette.datastructures import Headers, QueryParams
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..units import readable_bytes
from . import recordings

logger = logging.getLogger(__name__)

_UPLOAD, _HEARTBEAT = "/upload", "/heartbeat/"
_ENVELOPE_BYTES = 10_000
"""What a form may add to the files in it."""
_STRANGER = "Pages of other sites may not use this one. / 其他网站的页面不能使用本页面。"
_FULL = (
    "The server cannot keep the recording ({reason}): free space in its --tmp-dir, then try again. / "
    "服务器无法保存录音（{reason}）：请清理 --tmp-dir 所在磁盘后重试。"
)
#: What carries answers to people and programs: Gradio's event streams, and the recordings that they name.
_ANSWERS = ("/queue/", "/call/", "/file=")
_LINE, _LINE_CUT_S = "/queue/data", 3.0
"""Where a session hears what becomes of its requests, for as long as there are any; and how long it may be cut."""
_QUIET_S = 1.0
"""After an answer its receiver may come for the recordings in it: that long nobody has come means that nobody will."""


class Traffic:
    """`around` is an ASGI middleware. Uploads go to ``folder``, as files called ``tmp...`` while they are under way.

    ``upload_begins`` is called in a thread of its own whenever one does, ``session_begins`` with a page's session
    when that is there (again), and ``session_ends`` when it has not been heard of for `recordings.LEFT_FOR_S`.
    ``answers_end`` is called when a session has hung up on which it hears what becomes of its requests.
    """

    def __init__(
        self,
        folder: str,
        upload_begins: Callable[[], object] | None = None,
        session_begins: Callable[[str], object] | None = None,
        session_ends: Callable[[str], object] | None = None,
        answers_end: Callable[[str], object] | None = None,
        largest_upload_bytes: float = math.inf,
    ) -> None:
        self._folder = Path(folder)
        self._upload_begins = upload_begins
        self._session_begins = session_begins
        self._session_ends = session_ends
        self._answers_end = answers_end
        self._largest_upload_bytes = largest_upload_bytes
        self._changed = threading.Condition()
        self._under_way = 0
        self._last_s = -math.inf
        self._uploads = 0
        self._pages: Counter[str] = Counter()
        self._lines: Counter[str] = Counter()

    def around(self, app: ASGIApp) -> ASGIApp:
        async def passed_by(scope: Scope, receive: Receive, send: Send) -> None:
            path = scope.get("path", "") if scope["type"] == "http" else ""
            if path and scope["method"] == "POST" and Headers(scope=scope).get("sec-fetch-site") == "cross-site":
                await _say(403, _STRANGER)(scope, receive, send)
            elif path.endswith(_UPLOAD) and scope["method"] == "POST":
                await self._upload(app, scope, receive, send)
            elif _HEARTBEAT in path:
                await self._page(path.rpartition("/")[2], app, scope, receive, send)
            elif any(part in path for part in _ANSWERS):
                line = _session(scope) if path.endswith(_LINE) else None
                self._count(+1)
                if line:
                    self._lines[line] += 1
                try:
                    await app(scope, receive, send)
                finally:
                    self._count(-1)
                    if line:
                        self._lines[line] -= 1  # its next line may be on the way
                        asyncio.get_running_loop().call_later(_LINE_CUT_S, self._hung_up, line)
            else:
                await app(scope, receive, send)

        return passed_by

    async def _upload(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self._largest_upload_bytes + _ENVELOPE_BYTES:
            return await _say(413, too_large(self._largest_upload_bytes))(scope, receive, send)
        if self._upload_begins:
            asyncio.get_running_loop().run_in_executor(None, self._upload_begins)
        answered = False

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        self._uploads += 1
        try:
            await app(scope, receive, noted)
        except ClientDisconnect:
            logger.debug("An upload was given up")
        except OSError as error:
            logger.error("An upload could not be kept: %s", error)
            if answered:
                raise
            await _say(507, _FULL.format(reason=error.strerror))(scope, receive, send)
        finally:
            self._uploads -= 1
            if not self._uploads:  # then what lies there was left by those that were given up
                await to_thread.run_sync(self._sweep)

    def _sweep(self) -> None:
        for left in self._folder.glob("tmp*"):
            if left.is_file() and not self._uploads:
                left.unlink(missing_ok=True)

    async def _page(self, session: str, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """A page holds this line for as long as it is open, and takes it up again if it was cut."""
        self._pages[session] += 1
        if self._session_begins:
            self._session_begins(session)
        try:
            await app(scope, receive, send)
        finally:
            self._pages[session] -= 1
            asyncio.get_running_loop().call_later(recordings.LEFT_FOR_S, self._look_after, session)

    def _hung_up(self, session: str) -> None:
        if self._lines.get(session) == 0:
            del self._lines[session]
            if self._answers_end:
                asyncio.get_running_loop().run_in_executor(None, self._answers_end, session)

    def _look_after(self, session: str) -> None:
        if self._pages.get(session) == 0:
            del self._pages[session]
            if self._session_ends:
                asyncio.get_running_loop().run_in_executor(None, self._session_ends, session)

    def wait_until_quiet(self, within_s: float) -> bool:
        """Wait until all answers have been fetched; False if ``within_s`` passes first."""
        until_s = time.monotonic() + within_s
        with self._changed:
            while (now_s := time.monotonic()) < until_s:
                quiet_in_s = math.inf if self._under_way else self._last_s + _QUIET_S - now_s
                if quiet_in_s <= 0:
                    return True
                self._changed.wait(min(quiet_in_s, until_s - now_s))
        return False

    def _count(self, step: int) -> None:
        with self._changed:
            self._under_way += step
            self._last_s = time.monotonic()
            self._changed.notify_all()


def too_large(limit_bytes: float) -> str:
    """What is said of an upload beyond the limit."""
    size = readable_bytes(int(limit_bytes))
    return (
        f"The recording is larger than {size}: cut it, save it as FLAC or MP3, or start the app with a larger "
        f"--max-upload. / 录音超过 {size}：请裁剪、另存为 FLAC 或 MP3，或启动时调大 --max-upload。"
    )


def _session(scope: Scope) -> str:
    return QueryParams(scope["query_string"]).get("session_hash", "")


def _say(code: int, sentence: str) -> PlainTextResponse:
    return PlainTextResponse(sentence, code)
