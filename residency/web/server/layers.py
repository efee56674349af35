"""The decorator of all layers between the server and Gradio's application, and the layer for a root path."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .permissions import PUBLIC_HOST


def http_layer(handle: Callable[..., Awaitable[None]]) -> Callable[..., ASGIApp]:
    """Makes an ASGI middleware of a function or method ``async def handle(app, scope, receive, send)``.

    ``handle`` gets HTTP requests only; all else (the lifespan) goes to the wrapped application.
    """

    @functools.wraps(handle)
    def around(*arguments: Any) -> ASGIApp:
        app: ASGIApp = arguments[-1]

        async def layer(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await handle(*arguments, scope, receive, send)
            else:
                await app(scope, receive, send)

        return layer

    return around


def beneath(root_path: str) -> Callable[[ASGIApp], ASGIApp]:
    """Returns the layer for a reverse proxy that serves the app under a path, whether or not it removes that path.

    Moves the root path from ``path`` to ``root_path``: a path without a trailing slash, or a URL, whose host then
    counts as this site.
    """
    prefix, host = urlsplit(root_path).path, urlsplit(root_path).netloc

    @http_layer
    async def without_prefix(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if prefix and path == prefix:  # the page's own links are relative to a folder
            query = scope["query_string"].decode("latin-1")
            return await RedirectResponse(f"{prefix}/{query and '?'}{query}")(scope, receive, send)
        if prefix and path.startswith(f"{prefix}/"):
            path = path[len(prefix) :]
            # Starlette's router would remove it again, after the middleware that compares paths.
            if path == prefix or path.startswith(f"{prefix}/"):
                return await PlainTextResponse("Not Found", 404)(scope, receive, send)
        await app({**scope, "path": path, "root_path": prefix, PUBLIC_HOST: host or None}, receive, send)

    return without_prefix
