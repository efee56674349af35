"""``/sleep``, ``/wake_up`` and ``/is_sleeping``, so that routers drive this app as they drive vLLM's server.

Source: vLLM 0.32.0, entrypoints/serve/dev/sleep/api_router.py. As there, ``/sleep`` answers when the running requests
have ended and the models have left. Here, requests bring a model back; vLLM's wait for ``/wake_up``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from anyio import move_on_after
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from ...observability.events import Event
from ...status_types import ModelStatus, Status
from ..shared.protocols import Manager

LOOK_EVERY_S = 1.0
"""Interval in which ``/sleep`` looks for a closed connection and a closed manager."""

_LEVELS = {"1": "offload", "2": "release"}


class Sleeping(BaseModel):
    """Whether the app sleeps."""

    is_sleeping: bool = Field(description="No model is on the GPU, in use, or on its way.")


class SleepCalls:
    """The calls. ``change``: calls a method of the manager in a thread; ``read``: returns its status."""

    def __init__(
        self,
        manager: Manager,
        check: Callable[[Request], None],
        change: Callable[[Callable[[], bool | None]], Awaitable[bool | None]],
        read: Callable[[], Awaitable[Status]],
    ) -> None:
        self._manager, self._check, self._change, self._read = manager, check, change, read

    def add_to(self, app: FastAPI, changing: dict[str, Any], reading: dict[str, Any]) -> None:
        """Adds the calls to an application, with these keywords for their routes."""
        app.add_api_route("/is_sleeping", self.is_sleeping, **reading)
        level = _parameter("level", "1: to main memory; 2: released everywhere.", [1, 2])
        mode = _parameter("mode", "Running requests end first.", ["wait"])
        tags = _parameter("tags", "Not used.")
        for call, parameters in ((self.sleep, [level, mode, tags]), (self.wake_up, [tags])):
            extra = {"parameters": parameters, "security": [{"token": []}, {}]}
            app.add_api_route(
                f"/{call.__name__}", call, methods=["POST"], tags=["changing"], openapi_extra=extra,
                response_model=None, **changing,
            )  # fmt: skip

    async def is_sleeping(self) -> Sleeping:
        """Whether no model is on the GPU, in use or on its way, as vLLM's server tells it."""
        return Sleeping(is_sleeping=_sleeps(await self._read()))

    async def sleep(self, request: Request) -> JSONResponse:
        """As vLLM's: bring all models to main memory (level 1), or release them (2). Answers once they have left."""
        self._check(request)
        level, mode = request.query_params.get("level", "1"), request.query_params.get("mode", "wait")
        if level not in _LEVELS:
            raise HTTPException(400, f"level is 1 or 2, not {level!r} / level 只能是 1 或 2，不能是 {level!r}")
        if mode != "wait":
            raise HTTPException(400, f"mode is wait, not {mode!r}: running requests end first / "
                                     f"mode 只能是 wait，不能是 {mode!r}：正在处理的请求会先完成")  # fmt: skip
        failure = await self._leave(request, _LEVELS[level], ("released",) if level == "2" else ("cpu", "released"))
        if failure:
            return JSONResponse({"error": failure}, 500)
        return JSONResponse({"status": "sleeping", "level": int(level)})

    async def wake_up(self, request: Request) -> JSONResponse:
        """As vLLM's: begin to bring all models to the GPU. Answers at once: requests wait for their model anyway."""
        self._check(request)
        await self._change(self._manager.warm)
        return JSONResponse({"status": "awake", "tags": request.query_params.getlist("tags") or None})

    async def _leave(self, request: Request, call: str, places: tuple[str, ...]) -> str | None:
        """Waits until each model has left, though a request may have brought it back; returns why one could not."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        left: set[str] = set()
        failures: list[str] = []

        def note(event: Event) -> None:
            if event.target in places and event.what == "done":
                left.add(event.model)
            elif event.target in places and event.what == "failed":
                failures.append(f"{event.model}: {event.error}")
            changed.set()

        unsubscribe = self._manager.subscribe(lambda event: loop.call_soon_threadsafe(note, event))
        try:
            done = await self._change(getattr(self._manager, call))
            while not (done or failures or self._manager.closed or await request.is_disconnected()):
                changed.clear()
                models = (await self._read())["models"]
                done = all(name in left or model["state"] in places for name, model in models.items())
                if not done:
                    with move_on_after(LOOK_EVERY_S):
                        await changed.wait()
        finally:
            unsubscribe()
        return failures[0] if failures and not done else None


def _sleeps(status: Status) -> bool:
    here = "cpu" if status["device"]["kind"] == "cpu" else "gpu"
    return not any(_is_there(model, here) for model in status["models"].values())


def _is_there(model: ModelStatus, here: str) -> bool:
    move = model["progress"]
    return bool(model["leases"] or model["state"] == here or (move and (move["to"] == here or model["device_bytes"])))


def _parameter(name: str, description: str, choices: list[Any] | None = None) -> dict[str, Any]:
    schema = {"enum": choices, "default": choices[0]} if choices else {"type": "string"}
    return {"name": name, "in": "query", "description": description, "schema": schema}
