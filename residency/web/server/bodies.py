"""Limits the size of request bodies, with or without a Content-Length."""

from __future__ import annotations

from anyio import move_on_after
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LINGER_S = 30.0
"""Time limit for reading and dropping a body before the response, since clients read only after sending (as nginx)."""

_SMALL_BYTES = 1 << 16


def small_bodies_first(app: ASGIApp) -> ASGIApp:
    """Buffers small bodies before it calls the app, so that aborted requests are cheap. An ASGI middleware."""

    async def reading(scope: Scope, receive: Receive, send: Send) -> None:
        length = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if not length.isdecimal() or not 0 < int(length) <= _SMALL_BYTES:
            return await app(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        read: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def first_what_was_read() -> Message:
            return read.pop() if read else await receive()

        await app(scope, first_what_was_read, send)

    return reading


async def drop_body(receive: Receive) -> None:
    """Reads and drops the rest of a body, for a limited time, so that its sender reads the response."""
    with move_on_after(_LINGER_S):
        while (await receive()).get("more_body", False):
            pass


async def read_at_most(
    limit_bytes: float, refusal: str, app: ASGIApp, scope: Scope, receive: Receive, send: Send
) -> None:
    """Calls the app with a body of up to ``limit_bytes``; sends 413 with ``refusal`` if the body is larger."""
    read_bytes, more, answered = 0, True, False

    async def refuse() -> None:
        if more:
            await drop_body(receive)
        await PlainTextResponse(refusal, 413)(scope, receive, send)

    length = Headers(scope=scope).get("content-length", "")
    if length.isdecimal() and int(length) > limit_bytes:
        return await refuse()

    async def counted() -> Message:
        nonlocal read_bytes, more
        message = await receive()
        read_bytes += len(message.get("body", b""))
        more = message.get("more_body", False)
        # Simulates a disconnect, on which apps clean up.
        return message if read_bytes <= limit_bytes else {"type": "http.disconnect"}

    async def unless_refused(message: Message) -> None:
        nonlocal answered
        if answered or read_bytes <= limit_bytes:
            answered = True
            await send(message)

    try:
        await app(scope, counted, unless_refused)
    except ClientDisconnect:
        if read_bytes <= limit_bytes:
            raise
    if read_bytes > limit_bytes and not answered:
        await refuse()


async def given_up(request: Request, error: Exception) -> Response:
    """Handles the disconnect of a client during its body; the response is never read."""
    return Response(status_code=400)
