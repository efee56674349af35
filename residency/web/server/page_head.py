"""Adds a script to the page, which the browser runs before all others."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def with_script(script: str) -> Callable[[ASGIApp], ASGIApp]:
    """Returns an ASGI middleware that inserts JavaScript at the beginning of the head of the page at ``/``."""
    head = f"<head><script>\n{script}\n</script>".encode()

    def around(app: ASGIApp) -> ASGIApp:
        async def changed(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["method"] != "GET" or scope["path"] not in ("", "/"):
                await app(scope, receive, send)
                return
            start: Message | None = None

            async def send_changed(message: Message) -> None:
                nonlocal start
                if message["type"] == "http.response.start":
                    start = message
                    return
                if start is not None:
                    headers, body = MutableHeaders(raw=start["headers"]), message.get("body", b"")
                    if headers.get("content-type", "").startswith("text/html") and b"<head>" in body:
                        body = body.replace(b"<head>", head, 1)
                        headers["content-length"] = str(len(body))
                        message = {**message, "body": body}
                    await send({**start, "headers": headers.raw})
                    start = None
                await send(message)

            await app(scope, receive, send_changed)

        return changed

    return around
