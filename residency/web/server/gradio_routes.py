"""Closes Gradio's unused routes, and refuses malformed requests with a message.

Gradio answers many of these with a server error, and logs a traceback.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from fastapi.exceptions import RequestValidationError
from gradio.route_utils import API_PREFIX, FnIndexInferError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..shared.gradio_compat import CALL
from ..shared.language import preferred
from .cross_origin import API
from .layers import http_layer

logger = logging.getLogger(__name__)

_UNUSED = (
    "/monitoring", "/svelte", "/pwa_icon", *(f"{API_PREFIX}/{name}" for name in (
        "component_server", "custom_component", "deep_link", "dev", "file", "process_recording", "run-history", "runs",
        "stream", "undo-vibe-edit", "vibe-code", "vibe-edit", "vibe-starter-queries")),
)  # fmt: skip
_FETCHES = re.compile(rf"{API_PREFIX}/(proxy=|file=https?:)", re.IGNORECASE)
"""Routes for which Gradio sends requests to other servers."""
_GARBLED = (
    "请求无效：请刷新页面；API 客户端的参数见 /gradio_api/info，录音请以带文件名的表单上传。",
    "The request is invalid: reload the page. API clients: see /gradio_api/info for the arguments, and upload "
    "recordings in a form with a file name.",
)


def without(also: Iterable[str] = ()) -> Callable[[ASGIApp], ASGIApp]:
    """Returns the layer that answers 404 for unused routes and ``also``, and ends streams that Gradio aborts."""
    closed = re.compile(rf"({'|'.join(map(re.escape, (*_UNUSED, *also)))})(/|$)")

    @http_layer
    async def around(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if closed.match(path) or _FETCHES.match(path) or ("\0" in path and not path.startswith(API)):
            await _json({"detail": "Not Found"}, 404)(scope, receive, send)
        else:
            await _to_its_end(app, scope, receive, send)

    return around


async def _to_its_end(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Calls the app; suppresses the exception of event streams that have already reported an unknown session or event.

    Changes the status of calls with invalid inputs from 500, which Gradio sends for every error, to 400.
    """
    started = False
    call: dict[str, bool] = {}
    CALL.set(call)

    async def noted(message: Message) -> None:
        nonlocal started
        started = True
        if message["type"] == "http.response.start" and message["status"] == 500 and "garbled" in call:
            message = {**message, "status": 400}
        await send(message)

    try:
        await app(scope, receive, noted)
    except RuntimeError as error:
        if not started or not isinstance(error.__cause__, Exception):
            raise
        logger.debug("A stream ended early: %r", error.__cause__)
        await send({"type": "http.response.body", "body": b""})


async def _garbled(request: Request, error: Exception) -> Response:
    path, reads = request.scope["path"], request.method in ("GET", "HEAD")
    if reads and not path.startswith(f"{API_PREFIX}/"):
        raise error  # reading a page has no input that could be malformed
    logger.info("Refused a malformed request to %.100r: %.100r", path, error)
    return _json({"detail": preferred(request.headers.get("accept-language"))(*_GARBLED)}, 400)


async def _invalid(request: Request, error: Exception) -> Response:
    """Sends FastAPI's default response without the input, which may be long, or not valid JSON."""
    assert isinstance(error, RequestValidationError)
    return _json({"detail": [{key: each[key] for key in ("type", "loc", "msg")} for each in error.errors()]}, 422)


def _json(content: Any, code: int) -> Response:
    return Response(json.dumps(content), code, media_type="application/json")  # JSONResponse fails on lone surrogates


_Handler = Callable[[Request, Any], Awaitable[Response]]
HANDLERS: dict[type[Exception], _Handler] = {
    RequestValidationError: _invalid,
    **dict.fromkeys((LookupError, TypeError, ValueError, AttributeError, AssertionError, FnIndexInferError), _garbled),
}
"""Exception handlers of Gradio's application, for errors that its routes raise on invalid requests."""
