"""Chinese under the names that Gradio knows it by. Everybody else who reads it would get an English page.

Gradio's page speaks zh-CN and zh-TW; a browser that says zh-HK or zh-Hans-CN is taken for an English one, before
anything of ours is run. So the page's first line has those browsers call it by one of the two names.
"""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SCRIPT = b"""<script>
if (/^zh\\b/i.test(navigator.language)) {
  const known = /hant|tw|hk|mo/i.test(navigator.language) ? "zh-TW" : "zh-CN";
  Object.defineProperty(navigator, "language", {get: () => known});
}
</script>"""


def around(app: ASGIApp) -> ASGIApp:
    """An ASGI middleware."""

    async def with_known_names(scope: Scope, receive: Receive, send: Send) -> None:
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
                    body = body.replace(b"<head>", b"<head>" + _SCRIPT, 1)
                    headers["content-length"] = str(len(body))
                    message = {**message, "body": body}
                await send({**start, "headers": headers.raw})
                start = None
            await send(message)

        await app(scope, receive, send_changed)

    return with_known_names
