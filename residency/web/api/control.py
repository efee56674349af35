"""Health, status, metrics and control over plain HTTP, for scripts, orchestrators and dashboards.

An application of its own, so that it can be tried without a page; its description is at ``/docs``. Errors are
``{"error": a sentence that says what to do}``; requests that are refused for their sender or size get the sentence
alone, as plain text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from ... import errors, neighbor_errors
from ...observability.events import Event
from ...status_types import Status, UsageHistory
from ..server.bodies import BrokenOff, client_disconnected
from ..server.cross_origin import refusal_body
from ..server.layers import http_layer
from ..server.permissions import Permissions
from ..server.rate_limit import TooManyWrongKeys
from ..shared.language import Localize, preferred
from ..shared.protocols import Manager
from .event_stream import EventStream, Moves
from .metrics import CONTENT_TYPE, exposition
from .schema import Configuration, Health, Refusal, Which, WhichNeighbor
from .sleep import SleepCalls
from .speech_calls import SpeechCalls

logger = logging.getLogger(__name__)

_Keywords = dict[str, Any]
_Responses = dict[int | str, _Keywords]
"""Type of FastAPI's parameter ``responses``."""
_LARGEST_BODY_BYTES = 10_000
_FOLDERS = ("/gpu/", "/docs/", "/v1/")
_CODES: dict[type[Exception], int] = {
    TooManyWrongKeys: 429,
    errors.NotAllowed: 401,
    errors.UnknownModel: 404,
    errors.InvalidInput: 422,
    neighbor_errors.NeighborUnreachable: 502,
    neighbor_errors.NeighborRefused: 502,
    errors.ManagerClosed: 503,
    errors.DeviceLost: 503,
    errors.WorkerEnded: 503,
    errors.NotReady: 503,
    errors.TooManyListeners: 503,
}
_DESCRIPTIONS = {
    202: "The move has begun, or follows the running request or load.",
    400: "The level or the mode is not supported.",
    401: "Requests from other machines need the token.",
    403: "Requests from pages of other sites are refused.",
    404: "No such model, or neighbor.",
    413: "The request body is too large.",
    422: "The request is invalid.",
    429: "This address has sent too many wrong tokens or keys; `Retry-After` has the seconds to wait.",
    500: "The move failed; nothing is half-moved.",
    502: "The neighbor did not answer, or refused.",
    503: "The app is shutting down, its GPU or a worker process has failed, or too many programs listen.",
}
_NOT_JSON: _Keywords = {"response_class": Response, "response_model": None}
_CHANGES: tuple[tuple[str, type[BaseModel], str], ...] = (
    ("offload", Which, "Bring a model, or all, to main memory; after the running request, if there is one."),
    ("release", Which, "Free a model's memory, or that of all, everywhere; after the running request, if any."),
    ("warm", Which, "Begin to bring a model, or all, to the GPU."),
    ("configure", Configuration,
     "Change how long a model, or all, stays on the GPU and in main memory, from now on."),
    ("neighbors/ask", WhichNeighbor,
     "Ask one of the status's neighbors to give up what it holds idle. It is not asked while it is in use."),
)  # fmt: skip
"""Calls under ``/gpu``, named as the methods of the manager, with their request bodies and descriptions."""


def build(
    manager: Manager | None,
    permissions: Permissions,
    panel: Callable[[Localize, int | None], Any] | None = None,
    signed_in: Callable[[Request], str | None] | None = None,
    page_serves: Callable[[], bool] = lambda: True,
    speech: SpeechCalls | None = None,
) -> FastAPI:
    """Returns the application: ``/docs``, ``/v1/...`` with ``speech``, and with a manager the calls about the GPU.

    These are ``/healthz``, ``/readyz``, ``/metrics`` and ``/gpu/...``. ``panel`` returns the content of the page's
    panel, None if the page has that version. With ``signed_in`` (returns the name of a request's signed-in user, or
    None) reading needs the same permission as changes. ``page_serves`` returns whether the page is ready.
    """
    app = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        static_url="/docs/static",
        openapi_url="/openapi.json",
        title="GPU-managed speech",
        description=__doc__,
        version="1",
        responses=_refused_early(403),
        redirect_slashes=False,
        exception_handlers={
            HTTPException: _no_such_call,
            RequestValidationError: _invalid_query,
            ClientDisconnect: client_disconnected,
            errors.ResidencyError: _failed,
            Exception: _failed,
            **dict.fromkeys(_CODES, _refused),
        },
    )
    if speech:
        speech.add_to(app)
    if manager:
        _Calls(manager, permissions, panel, signed_in, page_serves).add_to(app)
    schema = app.openapi()
    schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}  # for ``/docs``
    if manager:
        schema["components"]["schemas"]["Event"] = TypeAdapter(Event).json_schema()
    return app


@dataclass(eq=False)
class _Calls:
    """The endpoints; their docstrings are the descriptions of the OpenAPI page. Arguments as for `build`.

    They use no thread of the server's pool: reading must work while all of its threads wait for models.
    """

    manager: Manager
    permissions: Permissions
    panel: Callable[[Localize, int | None], Any] | None
    signed_in: Callable[[Request], str | None] | None
    page_serves: Callable[[], bool]

    def __post_init__(self) -> None:
        self.moves = Moves(self.manager)
        self.readers, self.changers = CapacityLimiter(4), CapacityLimiter(16)

    def add_to(self, app: FastAPI) -> None:
        """Adds the calls to an application."""
        add, reading = app.add_api_route, _Keywords(tags=["looking"], dependencies=[Depends(self.may_read)])
        add("/healthz", self.healthz, tags=["health"])
        add("/readyz", self.readyz, tags=["health"], responses=_refusals(503))
        for endpoint in (self.healthz, self.readyz):
            add(f"/{endpoint.__name__}", endpoint, methods=["HEAD"], include_in_schema=False)
        add("/gpu/status", self.gpu_status, response_model=Status, responses=_refusals(401, 429), **reading)
        add("/gpu/history", self.gpu_history, response_model=UsageHistory, responses=_refusals(401, 429), **reading)
        add("/gpu/events", self.gpu_events, responses=_text("text/event-stream", 401, 429, 503), **_NOT_JSON, **reading)
        if self.panel:
            add("/gpu/panel", self.gpu_panel, include_in_schema=False, **_NOT_JSON, **reading)
        add("/metrics", self.prometheus, responses=_text("text/plain", 401, 429), **_NOT_JSON, **reading)
        for call, body, description in _CHANGES:
            self.add_change(app, call, body, description)
        sleeping = SleepCalls(self.manager, self.may_change, self._change, partial(self._read, self.manager.status))
        sleeping.add_to(
            app, {"responses": _refusals(400, 401, 429, 500, 503)}, {"responses": _refusals(401, 429), **reading}
        )

    def may_read(self, request: Request) -> None:
        if self.signed_in:
            self.permissions.check(request, self.signed_in(request))

    def may_change(self, request: Request) -> None:
        self.permissions.check(request, self.signed_in(request) if self.signed_in else None)

    async def healthz(self) -> Health:
        """Whether the process serves."""
        return Health(status="ok")

    async def readyz(self) -> Health:
        """Whether a request would be accepted."""
        if self.manager.closed:
            raise errors.ManagerClosed
        if self.manager.device_lost:
            raise self.manager.device_lost
        if not self.page_serves():
            raise errors.NotReady
        return Health(status="ok")

    async def gpu_status(self) -> JSONResponse:
        """Where the models are, in bytes and seconds; null where unknown. Never counts as use."""
        return JSONResponse(await self._read(self.manager.status))

    async def gpu_history(self) -> JSONResponse:
        """The last moves; and for the last 15 minutes, the models' sizes and requests, and the card's used memory."""
        return JSONResponse(await self._read(self.manager.history))

    async def gpu_events(self) -> EventStream:
        """The status, followed by the start, progress and end of each move, as server-sent events.

        The first event is named `status`, and its data is the `Status`; each other event is named by its `what`, and
        its data is an `Event`.
        """
        return EventStream(self.moves, lambda: self._read(self.manager.status))

    async def gpu_panel(self, request: Request, known: int | None = None) -> Response:
        assert self.panel is not None
        content = await self._read(self.panel, preferred(request.headers.get("accept-language")), known)
        if content is None:
            return Response(status_code=204)
        return JSONResponse(content, headers={"Cache-Control": "no-store"})

    async def prometheus(self) -> Response:
        """Metrics for Prometheus."""
        return Response(await self._read(exposition, self.manager), headers={"Content-Type": CONTENT_TYPE})

    def add_change(self, app: FastAPI, call: str, body: type[BaseModel], description: str) -> None:
        """Adds a call of `_CHANGES`. It answers with the status: 200, or 202 if the move follows later."""
        change: Callable[..., bool | None] = getattr(self.manager, call, self._ask_neighbor)
        follows: _Responses = {202: {"model": Status, "description": _DESCRIPTIONS[202]}}
        if call in ("configure", "neighbors/ask"):
            follows = {}
        failed = (502,) if body is WhichNeighbor else ()

        async def endpoint(request: Request) -> JSONResponse:
            # The permission is checked before the body is read.
            self.may_change(request)
            (_, which), *more = (await _body(request, body)).model_dump().items()
            done = await self._change(partial(change, which, **dict(more)))
            return JSONResponse(await self._read(self.manager.status), 202 if done is False else 200)

        app.add_api_route(
            f"/gpu/{call}",
            endpoint,
            methods=["POST"],
            name=f"gpu_{call.replace('/', '_')}",
            tags=["changing"],
            description=description,
            response_model=Status,
            responses={**follows, **_refusals(401, 404, 422, 429, 500, *failed, 503), **_refused_early(413)},
            openapi_extra={
                "requestBody": {
                    "required": bool(body.model_json_schema().get("required")),
                    "content": {"application/json": {"schema": body.model_json_schema()}},
                },
                "security": [{"token": []}, {}],
            },
        )

    def _ask_neighbor(self, url: str) -> None:
        sharing = self.manager.status()["sharing"]
        if url not in [neighbor["url"] for neighbor in (sharing["neighbors"] if sharing else ())]:
            raise HTTPException(404, f"{url} is none of this app's neighbors / {url} 不是本应用的邻居服务")
        self.manager.ask_neighbor(url)

    async def _change(self, change: Callable[[], bool | None]) -> bool | None:
        return await to_thread.run_sync(change, limiter=self.changers)

    async def _read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await to_thread.run_sync(function, *arguments, limiter=self.readers)


def route_to(api: FastAPI) -> Callable[[ASGIApp], ASGIApp]:
    """Returns the layer that routes the paths of ``api`` to it, all others to the wrapped application.

    ``api`` gets paths with the root path as prefix, as in the ASGI specification: static files need that.
    """

    paths = {path for route in api.routes if (path := getattr(route, "path", None))}
    folders = tuple(folder for folder in _FOLDERS if any(path.startswith(folder) for path in paths))

    @http_layer
    async def around(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in paths or path.startswith(folders):
            await api({**scope, "path": scope.get("root_path", "") + path}, receive, send)
        else:
            await app(scope, receive, send)

    return around


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
        such, such_zh = ' such as {"model": "tts"}, or {} for all', '，如 {"model": "tts"}，或 {} 表示全部'
        if "model" not in kind.model_fields:
            such, such_zh = "", ""
        raise errors.InvalidInput(
            f"Send a JSON object{such}; it may have {', '.join(fields)}{wrong}",
            f"请发送 JSON 对象{such_zh}；可用字段：{'、'.join(fields)}",
        ) from None


async def _refused(request: Request, error: Exception) -> JSONResponse:
    code = next(code for kind, code in _CODES.items() if isinstance(error, kind))
    more = {"known": list(error.known)} if isinstance(error, errors.UnknownModel) else {}
    headers = {"WWW-Authenticate": "Bearer"} if code == 401 else {}
    if isinstance(error, TooManyWrongKeys | errors.WorkerEnded):  # the next request starts a new worker
        headers = {"Retry-After": str(getattr(error, "retry_s", 1))}
    return JSONResponse({"error": str(error), **more}, code, headers)


async def _no_such_call(request: Request, error: Any) -> JSONResponse:
    reason = f"{request.method} {request.url.path}: {error.detail}. See /docs / 请参阅 /docs"
    headers = error.headers
    if error.status_code == 405:  # Starlette names the methods of the first route of this path only
        found: list[Any] = [each for each in request.app.routes if each.matches(request.scope)[0] == Match.PARTIAL]
        headers = {"Allow": ", ".join(sorted(set[str]().union(*(each.methods for each in found))))}
    if request.url.path.startswith("/v1/"):
        return JSONResponse(refusal_body(reason, "invalid_request_error"), error.status_code, headers)
    return JSONResponse({"error": reason}, error.status_code, headers)


async def _invalid_query(request: Request, error: Any) -> JSONResponse:
    wrong = "; ".join(f"{wrong['loc'][-1]}: {wrong['msg']}" for wrong in error.errors())
    return JSONResponse({"error": f"{request.url.path}: {wrong}. See /docs / 请参阅 /docs"}, 422)


async def _failed(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, BrokenOff):
        logger.error("A call over HTTP failed", exc_info=error)
    known = isinstance(error, errors.ResidencyError)
    words = str(error) if known else f"It failed: {error} / 操作失败：{error}"
    return JSONResponse({"error": words}, 500, None if known else {"Connection": "close"})  # the server closes it


def _refusals(*codes: int) -> _Responses:
    return {code: {"model": Refusal, "description": _DESCRIPTIONS[code]} for code in codes}


def _text(media_type: str, *codes: int) -> _Responses:
    """Describes a successful answer that is not JSON, and refusals."""
    return {200: {"content": {media_type: {"schema": {"type": "string"}}}}, **_refusals(*codes)}


def _refused_early(code: int) -> _Responses:
    """Describes refusals by the layers in front of this application, which are plain text."""
    return {code: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": _DESCRIPTIONS[code]}}
