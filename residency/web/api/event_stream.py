"""Streams the manager's events as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ...errors import TooManyListeners
from ..shared.protocols import Manager

STILL_HERE_S = 15.0
"""Interval of keep-alive comments, so that proxies do not close an idle stream."""

_LISTENERS = 100
_BACKLOG = 1000
_SAID_NOTHING = ": still here\n\n"


class EventStream(StreamingResponse):
    """Response that streams an iterator of `message`; disables caching and buffering in proxies."""

    media_type = "text/event-stream"

    def __init__(self, messages: AsyncIterator[str], place: AbstractContextManager[None]) -> None:
        super().__init__(messages, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            await super().__call__(scope, receive, send)


def message(kind: str, data: Any) -> str:
    """Returns an event; ``data`` is sent as JSON on a single line."""
    return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


class Moves:
    """Broadcast of the manager's `Event` objects to all listeners. For the thread of one loop.

    All listeners share one buffer of messages; each stores only the number of its next message.
    """

    def __init__(self, manager: Manager, most: int = _LISTENERS) -> None:
        self._manager = manager
        self._most = most
        self._listeners = 0
        self._told: deque[tuple[str, str]] = deque(maxlen=2 * _BACKLOG)  # (kind, message), the newest last
        self._count = 0
        self._news: asyncio.Future[None] | None = None
        self._unsubscribe: Callable[[], None] = lambda: None

    @contextmanager
    def place(self) -> Iterator[None]:
        """Reserves the place of a listener within this block. Raises `TooManyListeners` if none is free."""
        if self._listeners >= self._most:
            raise TooManyListeners(self._most)
        if not self._listeners:
            loop = asyncio.get_running_loop()
            self._unsubscribe = self._manager.subscribe(lambda event: loop.call_soon_threadsafe(self._tell, event))
        self._listeners += 1
        try:
            yield
        finally:
            self._listeners -= 1
            if not self._listeners:
                self._unsubscribe()
                self._told.clear()

    async def listen(self, status: Callable[[], Awaitable[Any]]) -> AsyncIterator[str]:
        """Yields ``status`` once, then every event with its ``what`` as kind, within the block of `place`.

        Slow listeners first miss progress events, and are then disconnected; they may reconnect.
        """
        following = self._count
        yield message("status", await status())
        while not self._manager.closed:
            if following == self._count:
                if not await self._wait():
                    yield _SAID_NOTHING
                continue
            behind = self._count - following
            if behind > len(self._told):
                return
            kind, said = self._told[-behind]
            following += 1
            if kind != "progress" or behind <= _BACKLOG:
                yield said

    def _tell(self, event: Any) -> None:
        self._told.append((event.what, message(event.what, asdict(event))))
        self._count += 1
        if self._news:
            self._news.set_result(None)
            self._news = None

    async def _wait(self) -> bool:
        """Waits for the next message; returns False after `STILL_HERE_S`."""
        if self._news is None:
            self._news = asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait({self._news}, timeout=STILL_HERE_S)
        return bool(done)
