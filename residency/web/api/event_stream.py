"""Streams the manager's events as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from anyio import move_on_after
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ...errors import TooManyListeners
from ..shared.protocols import Manager

KEEP_ALIVE_S = 15.0
"""Interval of keep-alive comments, so that proxies do not close an idle stream."""

_LISTENERS = 100
_BACKLOG = 1000
_KEEP_ALIVE = ": still here\n\n"
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # no buffering in proxies


class EventStream(Response):
    """Response that streams `Moves` to one listener. Raises `TooManyListeners` before it begins."""

    def __init__(self, moves: Moves, status: Callable[[], Awaitable[Any]]) -> None:
        super().__init__()
        self._moves, self._status = moves, status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._moves.listen(self._status) as messages:
            await StreamingResponse(messages, 200, _HEADERS, "text/event-stream")(scope, receive, send)


class Moves:
    """Broadcast of the manager's `Event` objects to all listeners. For the thread of one loop."""

    def __init__(self, manager: Manager, most: int = _LISTENERS) -> None:
        self._manager = manager
        self._most = most
        self._listeners: set[asyncio.Queue[str]] = set()
        self._unsubscribe: Callable[[], None] = lambda: None

    @contextmanager
    def listen(self, status: Callable[[], Awaitable[Any]]) -> Iterator[AsyncIterator[str]]:
        """Yields messages within this block: ``status`` once, then every event with its ``what`` as kind.

        Slow listeners first miss progress events, and are then disconnected; they may reconnect. Raises
        `TooManyListeners` if no place is free.
        """
        if len(self._listeners) >= self._most:
            raise TooManyListeners(self._most)
        if not self._listeners:
            loop = asyncio.get_running_loop()
            self._unsubscribe = self._manager.subscribe(lambda event: loop.call_soon_threadsafe(self._send, event))
        queue = asyncio.Queue[str]()
        self._listeners.add(queue)
        try:
            yield self._messages(queue, status)
        finally:
            self._remove(queue)

    async def _messages(self, queue: asyncio.Queue[str], status: Callable[[], Awaitable[Any]]) -> AsyncIterator[str]:
        yield _message("status", await status())
        while queue in self._listeners and not self._manager.closed:
            message = _KEEP_ALIVE
            with move_on_after(KEEP_ALIVE_S):
                message = await queue.get()
            yield message

    def _send(self, event: Any) -> None:
        message = _message(event.what, asdict(event))  # once for all listeners
        for queue in [*self._listeners]:
            if queue.qsize() >= 2 * _BACKLOG:
                self._remove(queue)
            elif queue.qsize() < _BACKLOG or event.what != "progress":
                queue.put_nowait(message)

    def _remove(self, queue: asyncio.Queue[str]) -> None:
        self._listeners.discard(queue)
        if not self._listeners:
            self._unsubscribe()


def _message(kind: str, data: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
