"""Chinese for everybody whose answers are in Chinese, under the names that Gradio knows it by.

Gradio's page speaks zh-CN and zh-TW, and looks at the browser's first language only, before anything of ours is run; a
browser that says zh-HK or zh-Hans-CN is taken for an English one. Answers are in the first of Chinese and English among
all its languages (`language.preferred`). So the page's first line has it named by that, if it is Chinese.
"""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SCRIPT = b"""<script>
{
  const read = navigator.languages.find(each => /^(zh|en)\\b/i.test(each));
  const known = /hant|tw|hk|mo/i.test(read) ? "zh-TW" : "zh-CN";
  if (/^zh/i.test(read)) Object.defineProperty(navigator, "language", {get: () => known});
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
