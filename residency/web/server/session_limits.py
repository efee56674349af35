"""Limits Gradio's sessions, queue, uploads and event streams, and the names that clients choose for them."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import HTTPException
from gradio import routes
from gradio.route_utils import API_PREFIX
from gradio.utils import LRUCache
from pydantic import AfterValidator, create_model
from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .layers import http_layer

SESSIONS = 500
"""Maximum of sessions with stored state; with Gradio 6 one takes 0.16 MB."""
PAGE_HEARTBEAT = f"{API_PREFIX}/here/"
"""Route of the page's heartbeat, followed by the session: Gradio does not reopen its own stream after a cut."""
HEARTBEAT = f"{API_PREFIX}/heartbeat/"
DATA, CALL = f"{API_PREFIX}/queue/data", f"{API_PREFIX}/call/"

_UPLOAD, _EVENTS = f"{API_PREFIX}/upload", "/gpu/events"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_QUEUED = 100
_UNFETCHED = 50
"""Maximum of requests of one session with unfetched results."""
_REMEMBERED = 2000
_BAD_NAME = (
    "A session or upload is named by 1 to 64 Latin letters, digits, hyphens and underscores: change its name. / "
    "会话或上传的名称须由 1 至 64 个英文字母、数字、连字符或下划线组成：请更改名称。"
)
_FULL = (
    "Too many requests are waiting: try again in a minute, and fetch the answers of earlier ones. / "
    "等待中的请求过多：请一分钟后重试，并先取回先前请求的结果。"
)
_SIGN_IN = "Sign in on the page first. / 请先在页面上登录。"
_TOO_MANY_STREAMS = (
    "Too many pages and programs listen: close pages that are not needed, and try again in a minute. / "
    "正在监听的页面和程序过多：请关闭不需要的页面，一分钟后重试。"
)
_LATER = {"Retry-After": "60", "Connection": "close"}


def session_requests(may_stay: Callable[[HTTPConnection], bool], most: int) -> Callable[[ASGIApp], ASGIApp]:
    """Returns the layer that checks names and limits the event streams to ``most``.

    ``may_stay`` returns whether a request is from a signed-in user, if required.
    """
    streams = 0

    @http_layer
    async def around(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal streams
        name, path = session_of(scope), scope["path"]
        if name is None and path.startswith(_UPLOAD):
            name = QueryParams(scope["query_string"]).get("upload_id")
        listens = path == _EVENTS or (name is not None and not path.startswith(PAGE_HEARTBEAT))
        is_stream = listens and scope["method"] == "GET"
        if name is not None and not _NAME.fullmatch(name):
            await PlainTextResponse(_BAD_NAME, 422)(scope, receive, send)
        elif path.startswith((PAGE_HEARTBEAT, HEARTBEAT)) and not may_stay(HTTPConnection(scope)):
            await PlainTextResponse(_SIGN_IN, 401)(scope, receive, send)
        elif is_stream and streams >= most:
            await PlainTextResponse(_TOO_MANY_STREAMS, 503, _LATER)(scope, receive, send)
        else:
            streams += is_stream
            try:
                await app(scope, receive, send)
            finally:
                streams -= is_stream

    return around


def session_of(scope: Scope) -> str | None:
    """Returns the session of an event stream or heartbeat; None for other requests.

    A session without a name has the ID of its single request.
    """
    path = scope["path"]
    if path == DATA:
        return QueryParams(scope["query_string"]).get("session_hash")
    if path.startswith(PAGE_HEARTBEAT):
        return str(path[len(PAGE_HEARTBEAT) :])
    if path.startswith(HEARTBEAT) or (path.startswith(CALL) and scope["method"] == "GET"):
        return str(path.rpartition("/")[2])
    return None


def limit_names() -> None:
    """Makes the next Gradio app answer 422 to bodies with an invalid session name."""
    for body in ("PredictBody", "SimplePredictBody", "SimplePredictBodyV2"):
        model = getattr(routes, body, None)
        if model is not None and model.__module__ != __name__:  # Gradio 5 lacks some of them
            field = model.model_fields["session_hash"]
            checked: Any = Annotated[field.annotation, AfterValidator(_checked)]
            setattr(
                routes, body, create_model(body, __base__=model, __module__=__name__, session_hash=(checked, field))
            )


def _checked(name: str | None) -> str | None:
    if name is not None and not _NAME.fullmatch(name):
        raise HTTPException(422, _BAD_NAME)
    return name


def limit_queue(queue: Any) -> None:
    """Limits the length of a running queue, and the number of unfetched results that it stores."""
    for stored in ("pending_event_ids_session", "event_analytics"):
        setattr(queue, stored, LRUCache(_REMEMBERED))
    push = queue.push

    async def push_if_room(body: Any, request: Any, username: str | None) -> Any:
        unfetched = queue.pending_event_ids_session.get(body.session_hash, ())
        if len(queue) >= _QUEUED or len(unfetched) >= _UNFETCHED:
            raise HTTPException(503, _FULL)
        return await push(body=body, request=request, username=username)

    queue.push = push_if_room


def limit_uploads() -> None:
    """Limits the number of uploads for which Gradio stores progress."""
    statuses: Any = routes.file_upload_statuses
    statuses._statuses = LRUCache(_REMEMBERED)
    statuses._signals = _UploadEvents(_REMEMBERED)


def forget_deleted_files(blocks: Any) -> None:
    """Removes deleted files from Gradio's sets of file names, which otherwise only grow."""
    for files in blocks.temp_file_sets:
        files -= {path for path in files if not os.path.exists(path)}


class _UploadEvents(LRUCache[str, asyncio.Event]):
    def __missing__(self, key: str) -> asyncio.Event:
        self[key] = signal = asyncio.Event()
        return signal
