"""A response whose bytes a thread makes while they are sent; a closed connection cancels the thread's work."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter, to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...cancellation import Cancellation, cancelled_by
from ...observability.error_classification import in_words
from ..server.bodies import BrokenOff
from .growing_file import GrowingFile, Room
from .openai_errors import described, refusal

logger = logging.getLogger(__name__)

Write = Callable[[bytes], object]
Work = Callable[[Write], None]
"""Calls its argument with each part of the response."""


class Streamed(Response):
    """Runs ``work`` in a thread and streams what it writes; an error before the first byte becomes a `refusal`.

    The thread never waits for the client. ``held`` is closed once the thread has ended; ``room`` reserves disk space
    from the first byte until all are sent. With ``sse`` the bytes are sent as OpenAI's events. ``server_timing``
    returns the header of that name, at the first byte.
    """

    def __init__(
        self,
        work: Work,
        media_type: str,
        folder: Path,
        room: Room,
        held: ExitStack,
        threads: CapacityLimiter,
        *,
        status: int = 200,
        headers: dict[str, str] | None = None,
        sse: bool = False,
        server_timing: Callable[[], str] = str,
    ) -> None:
        super().__init__(status_code=status)
        self._work, self._folder, self._room, self._held, self._threads = work, folder, room, held, threads
        self._sse, self._server_timing = sse, server_timing
        self._fields = {"content-type": "text/event-stream" if sse else media_type, "cache-control": "no-store",
                         "x-accel-buffering": "no", **(headers or {})}  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cancellation = Cancellation()
        output = GrowingFile(self._folder, self._room, asyncio.get_running_loop())
        thread = asyncio.ensure_future(self._run_in_thread(output, cancellation))
        watch = asyncio.ensure_future(_cancel_on_disconnect(receive, cancellation))
        try:
            await self._send(output, cancellation, scope, receive, send)
        finally:
            watch.cancel()
            thread.add_done_callback(lambda done: _in_thread(output.close))
            if not thread.done():
                _in_thread(cancellation.cancel)  # its callbacks take the manager's lock

    async def _run_in_thread(self, output: GrowingFile, cancellation: Cancellation) -> None:
        try:
            await to_thread.run_sync(self._run, output, cancellation, abandon_on_cancel=True, limiter=self._threads)
        except RuntimeError as error:  # the system has no thread left
            self._held.close()
            output.end(error)

    def _run(self, output: GrowingFile, cancellation: Cancellation) -> None:
        """Works, in a thread of its own."""
        error: Exception | None = None
        try:
            with self._held, cancelled_by(cancellation):
                self._work(output.write)
        except Exception as raised:
            error = raised
        except BaseException as raised:  # an engine that calls sys.exit()
            error = RuntimeError(f"{type(raised).__name__}: {raised}")
        output.end(error)

    async def _send(
        self, output: GrowingFile, cancellation: Cancellation, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            await output.begun()
        except Exception as error:
            if not cancellation.cancelled:  # else the client has left
                await refusal(error)(scope, receive, send)
            return
        if timing := self._server_timing():
            self._fields["server-timing"] = timing
        if output.complete and not self._sse:
            self._fields["content-length"] = str(output.size)
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self._fields.items()]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        try:
            async for piece in _events(output.pieces()) if self._sse else output.pieces():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except Exception as error:
            if cancellation.cancelled:
                return
            reason = " ".join(in_words(error).split())
            logger.error("%s broke off after %d bytes: %s", scope["path"], output.size, reason)
            # The server closes the connection without an end of the body, which shows clients that it is incomplete.
            raise BrokenOff from error
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _cancel_on_disconnect(receive: Receive, cancellation: Cancellation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    _in_thread(cancellation.cancel)


def _in_thread(call: Callable[[], object]) -> None:
    """Calls a function in a thread, or here if the system has no thread left."""
    try:
        asyncio.get_running_loop().run_in_executor(None, call)
    except RuntimeError:
        call()


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yields audio as OpenAI's events; an error is the last of them."""
    try:
        async for piece in pieces:
            yield event({"type": "speech.audio.delta", "audio": base64.b64encode(piece).decode()})
    except Exception as error:
        yield event({"type": "error", **described(error)[1]})
        return
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    yield event({"type": "speech.audio.done", "usage": usage})


def event(data: dict[str, Any]) -> bytes:
    """Returns a server-sent event, as OpenAI's API sends them."""
    return b"data: %s\n\n" % json.dumps(data).encode()
