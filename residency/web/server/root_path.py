"""The app behind a reverse proxy that serves it under a path of a site.

Some proxies remove that path from what they pass on, others do not. Behind this middleware there is no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .permissions import PUBLIC_HOST


def beneath(root_path: str) -> Callable[[ASGIApp], ASGIApp]:
    """Return an ASGI middleware that removes the root path from ``path`` and leaves it in ``root_path``.

    ``root_path`` is a path without a slash at its end, or a whole address, whose host then belongs to this site.
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
                # Starlette's router would remove it once more, behind the middleware that compares paths.
                if path == prefix or path.startswith(f"{prefix}/"):
                    return await PlainTextResponse("Not Found", 404)(scope, receive, send)
            await app({**scope, "path": path, "root_path": prefix, PUBLIC_HOST: host or None}, receive, send)

        return without_prefix

    return around
