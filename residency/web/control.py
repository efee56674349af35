"""Health and GPU control over plain HTTP, for scripts and orchestrators.

Looking is open to everybody who reaches the port. Changing calls are for people on this machine and for those
who know the token; a page of another site in somebody's browser is neither.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ..errors import InvalidInput, ManagerClosed, ResidencyError, UnknownModel
from .protocols import Manager

logger = logging.getLogger(__name__)


def routes(manager: Manager, token: str | None = None, *, trust_local: bool = True) -> list[Route]:
    """The routes of ``/healthz``, ``/readyz`` and ``/gpu``.

    ``trust_local=False`` asks this machine for the token too: behind a tunnel (``--share``) every caller looks local.
    """

    looking, acting = CapacityLimiter(4), CapacityLimiter(16)

    # Not in the threads of the server's pool: looking must work when all of those wait for models.
    async def healthz(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def readyz(request: Request) -> JSONResponse:
        return _refusal(503, str(ManagerClosed())) if manager.closed else JSONResponse({"status": "ok"})

    async def status(request: Request) -> JSONResponse:
        return JSONResponse(await to_thread.run_sync(manager.status, limiter=looking))

    def changing(change: Callable[[str | None], bool]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> JSONResponse:
            if not _may_change(request, token, trust_local):
                return _refusal(
                    401,
                    "Changing calls from elsewhere need the token: start the app with --control-token and send "
                    "'Authorization: Bearer TOKEN'. / 从其他地方发起的操作需要令牌：启动时设置 --control-token，"
                    "并发送请求头 'Authorization: Bearer TOKEN'。",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            try:
                name = _model_named(await request.body())
                done = await to_thread.run_sync(change, name, limiter=acting)
            except UnknownModel as error:
                return _refusal(404, str(error), known=list(error.known))
            except InvalidInput as error:
                return _refusal(422, str(error))
            except ManagerClosed as error:
                return _refusal(503, str(error))
            except Exception as error:
                logger.exception("A change asked for over HTTP failed")
                known = isinstance(error, ResidencyError)
                return _refusal(500, str(error) if known else f"It failed / 操作失败: {error}")
            return JSONResponse(await to_thread.run_sync(manager.status, limiter=looking), 200 if done else 202)

        return endpoint

    return [
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/gpu/status", status),
        Route("/gpu/offload", changing(manager.offload), methods=["POST"]),
        Route("/gpu/release", changing(manager.release), methods=["POST"]),
        Route("/gpu/warm", changing(manager.warm), methods=["POST"]),
    ]


def _refusal(code: int, sentence: str, *, headers: dict[str, str] | None = None, **facts: Any) -> JSONResponse:
    return JSONResponse({"error": sentence, **facts}, code, headers)


def _model_named(body: bytes) -> str | None:
    """The model that a body names: ``{"model": "tts"}``; ``{}`` or nothing is all (None). `InvalidInput` if garbled."""
    try:
        asked = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        asked = None
    name = asked.get("model") if isinstance(asked, dict) and asked.keys() <= {"model"} else 0
    if name is None or isinstance(name, str):
        return name
    raise InvalidInput(
        'Send {"model": "tts"} for one model, or {} for all, as JSON',
        '请发送 JSON：{"model": "tts"} 指定一个模型，或 {} 表示全部',
    )


def _may_change(request: Request, token: str | None, trust_local: bool) -> bool:
    if token is not None and hmac.compare_digest(_token_sent(request).encode(), token.encode()):
        return True
    return trust_local and _is_local(request) and not _from_another_site(request)


def _token_sent(request: Request) -> str:
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    return credentials.strip() if scheme.lower() == "bearer" else request.headers.get("x-control-token", "")


def _is_local(request: Request) -> bool:
    # uvicorn has put the address of a proxy's client in place of the proxy's, where the proxy told it.
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


def _from_another_site(request: Request) -> bool:
    """Whether a browser sends this for a page of somebody else: another origin, or a name rebound to this machine."""
    host = request.headers.get("host", "")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        return True
    hostname = urlsplit(f"//{host}").hostname or ""
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        return hostname != "localhost"
    return False
