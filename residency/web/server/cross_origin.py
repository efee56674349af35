"""Lets pages of named sites call the speech API from browsers (CORS), and gives its refusals the API's shape."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .layers import http_layer

NAMED_ORIGIN = "residency.named_origin"
"""Key in the ASGI scope: whether the request is for the API, from a page of a named site."""
API = "/v1/"
_EXPOSED = ("Server-Timing", "X-Edit", "Retry-After")


def cross_origin(origins: Sequence[str]) -> Callable[[ASGIApp], ASGIApp]:
    """Returns the layer; without ``origins`` browsers get no CORS headers.

    Refusals of the inner layers are plain text; this layer converts them to the API's JSON.
    """

    def layer(app: ASGIApp) -> ASGIApp:
        shaped = _refusals_as_json(app)
        allowing = CORSMiddleware(
            shaped, origins, allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"], expose_headers=_EXPOSED
        )

        @http_layer
        async def around(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
            if not scope["path"].startswith(API):
                await app(scope, receive, send)
            elif Headers(scope=scope).get("origin") in origins:
                await allowing({**scope, NAMED_ORIGIN: True}, receive, send)
            else:
                await shaped(scope, receive, send)

        return around(app)

    return layer


def refusal_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Returns the body of a refusal, in the shape of OpenAI's errors."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _refusals_as_json(app: ASGIApp) -> ASGIApp:
    async def shaped(scope: Scope, receive: Receive, send: Send) -> None:
        begun: Message | None = None
        text = b""

        async def reshaped(message: Message) -> None:
            nonlocal begun, text
            if message["type"] == "http.response.start" and message["status"] >= 400 and _is_text(message):
                begun = message
                return
            if begun is None:
                return await send(message)
            text += message.get("body", b"")
            if not message.get("more_body", False):
                kind = "server_error" if begun["status"] >= 500 else "invalid_request_error"
                body = json.dumps(refusal_body(text.decode(errors="replace").strip(), kind)).encode()
                headers = MutableHeaders(raw=list(begun["headers"]))
                headers["content-type"], headers["content-length"] = "application/json", str(len(body))
                await send({**begun, "headers": headers.raw})
                await send({"type": "http.response.body", "body": body})

        await app(scope, receive, reshaped)

    return shaped


def _is_text(message: Message) -> bool:
    return Headers(raw=message["headers"]).get("content-type", "").startswith("text/")
