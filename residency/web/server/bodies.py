"""Limits the size of request bodies, with or without a Content-Length."""

from __future__ import annotations

from anyio import move_on_after
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LINGER_S = 30.0
"""Time limit for reading and dropping a body before the response, since clients read only after sending (as nginx)."""


def announced_bytes(scope: Scope) -> int | None:
    """Returns the Content-Length of a request, None without one."""
    length = Headers(scope=scope).get("content-length", "")
    return int(length) if length.isdecimal() else None


async def drop_body(receive: Receive) -> None:
    """Reads and drops the rest of a body, for a limited time, so that its sender reads the response."""
    with move_on_after(_LINGER_S):
        while (await receive()).get("more_body", False):
            pass


async def read_at_most(
    limit_bytes: float, refusal: str, app: ASGIApp, scope: Scope, receive: Receive, send: Send
) -> None:
    """Calls the app with a body of up to ``limit_bytes``; sends 413 with ``refusal`` if the body is larger.

    Reads the rest of a body before a refusal, unless the client waits for leave to send it.
    """
    headers = Headers(scope=scope)
    read_bytes, answered = 0, False
    more = bool(announced_bytes(scope)) or "transfer-encoding" in headers

    async def counted() -> Message:
        nonlocal read_bytes, more
        message = await receive()
        read_bytes += len(message.get("body", b""))
        more = message.get("more_body", False)
        # Simulates a disconnect, on which apps clean up.
        return message if read_bytes <= limit_bytes else {"type": "http.disconnect"}

    async def unless_refused(message: Message) -> None:
        nonlocal answered, more
        if answered or read_bytes <= limit_bytes:
            if message.get("status", 0) >= 400 and more and "expect" not in headers:
                more = False
                await drop_body(receive)
            answered = True
            await send(message)

    is_larger = (announced_bytes(scope) or 0) > limit_bytes
    if not is_larger:
        try:
            await app(scope, counted, unless_refused)
        except ClientDisconnect:
            if read_bytes <= limit_bytes:
                raise
    if is_larger or (read_bytes > limit_bytes and not answered):
        if more:
            await drop_body(receive)
        await PlainTextResponse(refusal, 413)(scope, receive, send)


class BrokenOff(Exception):
    """A response failed after it had begun, which was logged. The server closes the connection before its end."""


async def client_disconnected(request: Request, error: Exception) -> Response:
    """Handles the disconnect of a client during its body; the response is never read."""
    return Response(status_code=400)
