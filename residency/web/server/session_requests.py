"""Checks names of sessions and uploads, and limits the number of open event streams."""

from __future__ import annotations

from collections.abc import Callable

from gradio.route_utils import API_PREFIX
from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .session_limits import NAMELESS, is_name

HERE = f"{API_PREFIX}/here/"
"""Route of the page's heartbeat, followed by the session: Gradio does not reopen its own stream after a cut."""
HEARTBEAT = f"{API_PREFIX}/heartbeat/"
DATA, CALL = f"{API_PREFIX}/queue/data", f"{API_PREFIX}/call/"

_OF_UPLOADS, _EVENTS = f"{API_PREFIX}/upload", "/gpu/events"
_SIGN_IN = "Sign in on the page first. / 请先在页面上登录。"
_NO_LINE = (
    "Too many pages and programs listen: close pages that are not needed, and try again in a minute. / "
    "正在监听的页面和程序过多：请关闭不需要的页面，一分钟后重试。"
)
_LATER = {"Retry-After": "60", "Connection": "close"}


class SessionRequests:
    """`around` is an ASGI middleware. ``may_stay`` returns whether a request is from a signed-in user, if required."""

    def __init__(self, may_stay: Callable[[HTTPConnection], bool], most: int) -> None:
        self._may_stay = may_stay
        self._most = most
        self._held = 0

    def around(self, app: ASGIApp) -> ASGIApp:
        async def look(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            session, path = session_of(scope), scope["path"]
            name = _upload(scope) if session is None else session
            listens = path == _EVENTS or (name is not None and not path.startswith(HERE))
            is_line = listens and scope["method"] == "GET"
            if name is not None and not is_name(name):
                await PlainTextResponse(NAMELESS, 422)(scope, receive, send)
            elif path.startswith((HERE, HEARTBEAT)) and not self._may_stay(HTTPConnection(scope)):
                await PlainTextResponse(_SIGN_IN, 401)(scope, receive, send)
            elif is_line and self._held >= self._most:
                await PlainTextResponse(_NO_LINE, 503, _LATER)(scope, receive, send)
            else:
                self._held += is_line
                try:
                    await app(scope, receive, send)
                finally:
                    self._held -= is_line

        return look


def session_of(scope: Scope) -> str | None:
    """Returns the session of an event stream or heartbeat; None for other requests.

    A session without a name has the ID of its single request.
    """
    path = scope["path"]
    if path == DATA:
        return QueryParams(scope["query_string"]).get("session_hash")
    if path.startswith(HERE):
        return str(path[len(HERE) :])
    if path.startswith(HEARTBEAT) or (path.startswith(CALL) and scope["method"] == "GET"):
        return str(path.rpartition("/")[2])
    return None


def _upload(scope: Scope) -> str | None:
    """Returns the name of the upload that a request starts or watches, or None."""
    return QueryParams(scope["query_string"]).get("upload_id") if scope["path"].startswith(_OF_UPLOADS) else None
