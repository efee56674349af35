"""Server-sent events: what happens, told over an HTTP response that does not end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from typing import Any

from starlette.responses import StreamingResponse

from .protocols import Manager

STILL_HERE_S = 15.0
"""Something is said at least this often, so that proxies do not take the line for dead."""

_BACKLOG = 1000
_SAID_NOTHING = ": still here\n\n"


class EventStream(StreamingResponse):
    """Sends what an iterator of `message` gives, and is not kept by anybody on the way."""

    media_type = "text/event-stream"

    def __init__(self, messages: AsyncIterator[str]) -> None:
        super().__init__(messages, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


def message(kind: str, data: Any) -> str:
    """One event; ``data`` is sent as JSON, which has no line ends."""
    return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


async def moves(manager: Manager, status: Callable[[], Awaitable[Any]]) -> AsyncIterator[str]:
    """``status`` once, then every `Event` of the manager's, by its ``what``, until the listener leaves.

    One who is too slow loses progress first, and is then sent away; they may come again and get the status.
    """
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def tell(event: Any) -> None:
        if event.what != "progress" or events.qsize() < _BACKLOG:
            loop.call_soon_threadsafe(events.put_nowait, event)

    unsubscribe = manager.subscribe(tell)
    try:
        yield message("status", await status())
        while events.qsize() < 2 * _BACKLOG and not manager.closed:
            try:
                event = await asyncio.wait_for(events.get(), STILL_HERE_S)
            except asyncio.TimeoutError:  # another class than TimeoutError in Python 3.10
                yield _SAID_NOTHING
            else:
                yield message(event.what, asdict(event))
    finally:
        unsubscribe()
