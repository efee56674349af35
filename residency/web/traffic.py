"""Looks at the HTTP requests that pass by: which answers are still on their way, and when an upload begins."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

#: What carries answers to people and programs: Gradio's event streams, and the recordings that they name.
_ANSWERS = ("/queue/", "/call/", "/file=")
_QUIET_S = 1.0
"""After an answer its receiver may come for the recordings in it: that long nobody has come means that nobody will."""


class Traffic:
    """`around` is an ASGI middleware. ``upload_begins`` is called in a thread of its own whenever one does."""

    def __init__(self, upload_begins: Callable[[], object] | None = None) -> None:
        self._upload_begins = upload_begins
        self._changed = threading.Condition()
        self._under_way = 0
        self._last_s = -math.inf

    def around(self, app: ASGIApp) -> ASGIApp:
        async def passed_by(scope: Scope, receive: Receive, send: Send) -> None:
            path = scope.get("path", "") if scope["type"] == "http" else ""
            if self._upload_begins and path.endswith("/upload") and scope["method"] == "POST":
                asyncio.get_running_loop().run_in_executor(None, self._upload_begins)
            if not any(part in path for part in _ANSWERS):
                return await app(scope, receive, send)
            self._count(+1)
            try:
                await app(scope, receive, send)
            finally:
                self._count(-1)

        return passed_by

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
