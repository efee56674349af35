"""Health, status, metrics and control over plain HTTP, for scripts, orchestrators and dashboards.

An application of its own, so that it can be tried without a page; its description is at ``/docs``. Answers that are no
success are ``{"error": a sentence that says what to do}``; what is refused for who sends it or for its size, before it
comes here, is answered with the sentence alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from ... import errors
from ...observability.events import Event
from ...status_types import Status, UsageHistory
from ..server.bodies import given_up
from ..server.layers import http_layer
from ..server.permissions import Permissions
from ..shared.language import Localize, preferred
from ..shared.protocols import Manager
from . import metrics
from .event_stream import EventStream, Moves
from .schema import Configuration, Health, Refusal, Which

logger = logging.getLogger(__name__)

_LARGEST_BODY_BYTES = 10_000
_STATIC = "/docs/static"
_PATHS = {"/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"}
_Keywords = dict[str, Any]
_Responses = dict[int | str, _Keywords]
"""Type of FastAPI's parameter ``responses``."""
_CODES: dict[type[Exception], int] = {
    errors.NotAllowed: 401,
    errors.UnknownModel: 404,
    errors.InvalidInput: 422,
    errors.ManagerClosed: 503,
    errors.DeviceLost: 503,
    errors.NotReady: 503,
    errors.TooManyListeners: 503,
}


def build(
    manager: Manager,
    permissions: Permissions,
    panel: Callable[[Localize, int | None], Any] | None = None,
    signed_in: Callable[[Request], str | None] | None = None,
    page_serves: Callable[[], bool] = lambda: True,
) -> FastAPI:
    """Returns the application: ``/healthz``, ``/readyz``, ``/metrics``, ``/gpu/...`` and ``/docs``.

    ``panel`` returns the content of the page's panel, None if the page has that version. With ``signed_in`` (returns
    the name of a request's signed-in user, or None) reading needs the same permission as changes. ``page_serves``
    returns whether the page is ready.
    """
    app = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        static_url=_STATIC,
        openapi_url="/openapi.json",
        title="GPU management",
        description=__doc__,
        version="1",
        responses=_early(403),
        redirect_slashes=False,
        exception_handlers={
            HTTPException: _said,
            RequestValidationError: _garbled,
            ClientDisconnect: given_up,
            Exception: _failed,
        },
    )

    # Not in the server's thread pool: reading must work while all of its threads wait for models.
    reading, changing = CapacityLimiter(4), CapacityLimiter(16)

    async def read(function: Callable[..., Any], *arguments: Any) -> Any:
        return await to_thread.run_sync(function, *arguments, limiter=reading)

    def may_read(request: Request) -> None:
        if signed_in:
            permissions.check(request, signed_in(request))

    def may_change(request: Request) -> None:
        permissions.check(request, signed_in(request) if signed_in else None)

    async def change(act: Callable[[], bool]) -> JSONResponse:
        done = await to_thread.run_sync(act, limiter=changing)
        return JSONResponse(await read(manager.status), 200 if done else 202)

    app.include_router(_health(manager, page_serves))
    app.include_router(_reads(manager, read, panel), dependencies=[Depends(may_read)])
    app.include_router(_changes(manager, may_change, change))
    for kind in _CODES:
        app.add_exception_handler(kind, _refused)
    _describe(app)
    return app


def _health(manager: Manager, page_serves: Callable[[], bool]) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz")
    async def healthz() -> Health:
        """Whether the process serves."""
        return Health(status="ok")

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", responses=_refusals(503))
    async def readyz() -> Health:
        """Whether a request would be accepted."""
        if manager.closed:
            raise errors.ManagerClosed
        if manager.device_lost:
            raise manager.device_lost
        if not page_serves():
            raise errors.NotReady
        return Health(status="ok")

    return router


def _reads(
    manager: Manager, read: Callable[..., Awaitable[Any]], panel: Callable[[Localize, int | None], Any] | None
) -> APIRouter:
    """The calls that change nothing. ``read`` runs a function in a thread of its own pool."""
    router, moves = APIRouter(tags=["looking"]), Moves(manager)

    @router.get("/gpu/status", response_model=Status, responses=_refusals(401))
    async def gpu_status() -> JSONResponse:
        """Where the models are, in bytes and seconds; null where unknown. Never counts as use."""
        return JSONResponse(await read(manager.status))

    @router.get("/gpu/history", response_model=UsageHistory, responses=_refusals(401))
    async def gpu_history() -> JSONResponse:
        """The last moves; and of 15 minutes the models' sizes and requests, and what was used of the card."""
        return JSONResponse(await read(manager.history))

    @router.get("/gpu/events", response_class=Response, responses=_EVENTS)
    async def gpu_events() -> EventStream:
        """The status, and then every move as it begins, goes on and ends, as server-sent events.

        The first is called `status`, and its data is the `Status`; the others are called by their `what`, and their
        data is an `Event`.
        """
        return EventStream(moves.listen(lambda: read(manager.status)), moves.place())

    if panel:

        @router.get("/gpu/panel", include_in_schema=False)
        async def gpu_panel(request: Request, known: int | None = None) -> Response:
            content = await read(panel, preferred(request.headers.get("accept-language")), known)
            return Response(status_code=204) if content is None else JSONResponse(content, headers=_NOT_KEPT)

    @router.get("/metrics", response_class=Response, responses=_METRICS)
    async def prometheus() -> Response:
        """Metrics for Prometheus."""
        text = await read(metrics.exposition, manager)
        return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE})

    return router


def _changes(
    manager: Manager,
    may_change: Callable[[Request], None],
    change: Callable[[Callable[[], bool]], Awaitable[JSONResponse]],
) -> APIRouter:
    """The calls that move models. ``change`` runs a function in a thread and answers with the status."""
    router = APIRouter(tags=["changing"])

    def add(path: str, body: type[BaseModel], act: Callable[[Any], bool], words: str, *also: int) -> None:
        async def endpoint(request: Request) -> JSONResponse:
            may_change(request)  # before its body is read
            asked = await _body(request, body)
            return await change(lambda: act(asked))

        router.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            name=path.strip("/").replace("/", "_"),
            description=words,
            response_model=Status,
            responses={
                **{code: {"model": Status, "description": "It will follow."} for code in also},
                **_refusals(401, 404, 422, 500, 503),
                **_early(413),
            },
            openapi_extra={
                "requestBody": {"content": {"application/json": {"schema": body.model_json_schema()}}},
                "security": [{"token": []}, {}],
            },
        )

    add("/gpu/offload", Which, lambda asked: manager.offload(asked.model),
        "Bring a model, or all, to main memory; after the running request, if there is one.", 202)  # fmt: skip
    add("/gpu/release", Which, lambda asked: manager.release(asked.model),
        "Free a model's memory, or that of all, everywhere; after the running request, if any.", 202)  # fmt: skip
    add("/gpu/warm", Which, lambda asked: manager.warm(asked.model),
        "Begin to bring a model, or all, to the GPU.", 202)  # fmt: skip
    add("/gpu/configure", Configuration, lambda asked: _configure(manager, asked),
        "Change how long a model, or all, stays on the GPU and in main memory, from now on.")  # fmt: skip
    return router


def beside(api: ASGIApp) -> Callable[[ASGIApp], ASGIApp]:
    """Returns the layer that routes the paths of ``api`` to it, all others to the wrapped application.

    ``api`` gets paths with the root path as prefix, as in the ASGI specification: static files need that.
    """

    @http_layer
    async def around(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in _PATHS or path.startswith(("/gpu/", "/docs/")):
            await api({**scope, "path": scope.get("root_path", "") + path}, receive, send)
        else:
            await app(scope, receive, send)

    return around


def _configure(manager: Manager, asked: Configuration) -> bool:
    manager.configure(asked.model, keep_warm=asked.keep_warm, idle_timeout=asked.idle_timeout)
    return True


async def _body(request: Request, kind: type[BaseModel]) -> Any:
    """Parses the body as JSON, whatever its Content-Type; an empty body is ``{}``. Raises `InvalidInput`."""
    text = b""
    try:
        async for piece in request.stream():
            text += piece
            if len(text) > _LARGEST_BODY_BYTES:
                raise ValueError("too long")
        return kind.model_validate(json.loads(text) if text.strip() else {}, strict=True)
    except (ValueError, RecursionError) as error:
        fields = [f'"{name}"' for name in kind.model_fields]
        wrong = f" ({error.errors()[0]['msg']})" if isinstance(error, ValidationError) else ""
        raise errors.InvalidInput(
            f'Send a JSON object such as {{"model": "tts"}}, or {{}} for all; it may have {", ".join(fields)}{wrong}',
            f'请发送 JSON 对象，如 {{"model": "tts"}}，或 {{}} 表示全部；可用字段：{"、".join(fields)}',
        ) from None


async def _refused(request: Request, error: Exception) -> JSONResponse:
    code = next(code for kind, code in _CODES.items() if isinstance(error, kind))
    more = {"known": list(error.known)} if isinstance(error, errors.UnknownModel) else {}
    headers = {"WWW-Authenticate": "Bearer"} if code == 401 else None
    return JSONResponse({"error": str(error), **more}, code, headers)


async def _said(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    reason = f"{request.method} {request.url.path}: {error.detail}. See /docs / 请参阅 /docs"
    return JSONResponse({"error": reason}, error.status_code, error.headers)


async def _garbled(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    wrong = "; ".join(f"{wrong['loc'][-1]}: {wrong['msg']}" for wrong in error.errors())
    return JSONResponse({"error": f"{request.url.path}: {wrong}. See /docs / 请参阅 /docs"}, 422)


async def _failed(request: Request, error: Exception) -> JSONResponse:
    logger.error("A call over HTTP failed", exc_info=error)
    known = isinstance(error, errors.ResidencyError)
    return JSONResponse({"error": str(error) if known else f"It failed: {error} / 操作失败：{error}"}, 500)


def _refusals(*codes: int) -> _Responses:
    words = {401: "Not allowed from elsewhere without the token.", 404: "No such model.", 422: "Garbled.",
             500: "The move failed; nothing is half-moved.",
             503: "The app is shutting down, its GPU has failed, or too many listen."}  # fmt: skip
    return {code: {"model": Refusal, "description": words[code]} for code in codes}


def _early(*codes: int) -> _Responses:
    words = {403: "A page of another site may not ask.", 413: "So much is not read."}
    sentence = {"text/plain": {"schema": {"type": "string"}}}
    return {code: {"content": sentence, "description": words[code]} for code in codes}


_NOT_KEPT = {"Cache-Control": "no-store"}
_EVENTS: _Responses = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "It does not end."},
    **_refusals(401, 503),
}
_METRICS: _Responses = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
    **_refusals(401),
}


def _describe(app: FastAPI) -> None:
    """Adds the token, so that ``/docs`` accepts it, and the events of streams to the OpenAPI schema."""
    schema = app.openapi()
    schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    schema["components"]["schemas"]["Event"] = TypeAdapter(Event).json_schema()
    app.openapi_schema = schema
