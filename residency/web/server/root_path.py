"""Supports reverse proxies that serve the app under a path, whether or not they remove that path from requests."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .permissions import PUBLIC_HOST


def beneath(root_path: str) -> Callable[[ASGIApp], ASGIApp]:
    """Returns an ASGI middleware that moves the root path from ``path`` to ``root_path``.

    ``root_path`` is a path without a trailing slash, or a URL, whose host then counts as this site.
    """
    prefix, host = urlsplit(root_path).path, urlsplit(root_path).netloc

    def around(app: ASGIApp) -> ASGIApp:
        async def without_prefix(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] not in ("http", "websocket"):
                return await app(scope, receive, send)
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

    return around
