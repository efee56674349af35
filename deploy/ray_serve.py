"""The speech API in front of managed engines on Ray Serve.

Composition root: flags -> replicas with one managed engine each -> the FastAPI app of app.py. Deploy it with
``serve deploy deploy/ray_serve.yaml``; the names of the deployments there are ``Engine`` and ``Api``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.handle import DeploymentHandle

from residency.cluster import is_builtin
from residency.cluster.flags import API, ENGINE, MODEL, check, parsed
from residency.errors import EngineUnavailable, InvalidInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from starlette.types import ASGIApp

    from residency.cluster.replica import Answered, Asked, Replica

logger = logging.getLogger(__name__)

FAULT_PAUSE_S = 1.0
"""How long a call takes at least that fails by its machine: it keeps its place, so that others get more calls."""

CLOSED_WITHIN_S = 30.0
"""Maximum duration of moves at the end of a replica, whose calls have ended before."""


class Arguments(BaseModel):
    """Flags of app.py, as one line each.

    Attributes:
        api: those of the API, such as ``--api-key KEY --voices-dir /shared/voices``.
        engine: those of GPU management, such as ``--gpu-keep-warm 30s``.
        models: those of each engine, by the name that requests give as ``model``; the first one is the default.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)  # keys of the API

    api: str = ""
    engine: str = ""
    models: dict[str, str] = Field({"builtin": "--engine builtin"}, min_length=1)


@serve.deployment
class Engine:
    """A replica: managed engines in a process of its own, one for each model that was asked for there."""

    def __init__(self, flags: str, models: dict[str, str]) -> None:
        import app
        from residency.cluster.ray_metrics import RayMetrics
        from residency.launch.lifetime import private_folder

        self._flags, self._models = flags, models
        settings = parsed(flags, "--enable-gpu-management")
        self._at_end = ExitStack()
        self._folder = self._at_end.enter_context(private_folder(settings.tmp_dir))
        self._manager = app.make_manager(settings)
        self._at_end.callback(self._manager.close, CLOSED_WITHIN_S)
        self._metrics = RayMetrics(self._manager)

    async def call(self, asked: Asked, recording: NDArray[np.uint8]) -> Answered:
        """Returns the answer of the engine; see `Replica.call`. Errors cross the processes as part of it."""
        from residency.cluster.replica import failed

        try:
            replica = await self._replica(serve.get_multiplexed_model_id() or next(iter(self._models)))
            answered = await replica.call(asked, recording)
        except Exception as error:
            answered = failed(error)
        if answered.elsewhere:
            await asyncio.sleep(FAULT_PAUSE_S)
        if self._manager.device_lost:
            # All calls would fail at once, so that Serve would send most calls here. Ray starts another process.
            logger.error("This replica ends: %s", self._manager.device_lost)
            os._exit(1)
        return answered

    @serve.multiplexed(max_num_models_per_replica=-1)
    async def _replica(self, model: str) -> Replica:
        """Returns the engine of a model. Their number has no limit: the manager releases those that are idle."""
        import app
        from residency.cluster.replica import ModelNotThere, Replica

        if model not in self._models:
            raise ModelNotThere(model)
        try:
            settings = parsed(self._models[model], self._flags, "--enable-gpu-management")
            engine = app.managed(settings, self._manager, app.choose_engine(settings), model)
        except InvalidInput as error:  # no fault of the request
            raise EngineUnavailable(f"The model {model}: {error.en}", f"模型 {model}：{error.zh}") from error
        return Replica(engine, self._manager, self._folder)

    def check_health(self) -> None:
        """Called by Serve every few seconds. Passes the metrics on."""
        try:
            self._metrics.update()
        except Exception:
            logger.exception("The metrics were not passed on")

    def __del__(self) -> None:
        """Called by Serve before it ends the replica, after the running calls."""
        if hasattr(self, "_at_end"):
            self._at_end.close()


@serve.deployment
@serve.ingress()
class Api:
    """The HTTP calls of app.py under ``/v1`` and ``/docs``, in front of the replicas of `Engine`."""

    def __init__(self, flags: str, models: dict[str, str], engine: DeploymentHandle[Any]) -> None:
        from residency.launch.lifetime import private_folder

        self._settings = parsed(flags)
        self._models = {name: is_builtin(shlex.split(its_flags)) for name, its_flags in models.items()}
        self._engine = engine
        self._at_end = ExitStack()
        self._folder = self._at_end.enter_context(private_folder(self._settings.tmp_dir))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        from residency.cluster.api import build

        return build(self._settings, self._models, self._engine, self._folder)

    def models(self) -> dict[str, bool]:
        """Returns the models, and whether each is the built-in engine."""
        return self._models

    def __del__(self) -> None:
        if hasattr(self, "_at_end"):
            self._at_end.close()


def build(arguments: dict[str, Any]) -> serve.Application:
    """Returns the application for ``serve deploy`` and ``serve run``, whose file has the options of the deployments.

    ``arguments``: see `Arguments`. Serve validates them only where annotations are no strings.
    """
    return bound(Arguments.model_validate(arguments), Engine, Api)


def bound(arguments: Arguments, engine: serve.Deployment, api: serve.Deployment) -> serve.Application:
    """Returns the application of two deployments: `Engine` and `Api`, with options."""
    # Wrong flags fail here, and not in each replica.
    check("api", arguments.api, API)
    check("engine", arguments.engine, ENGINE)
    for name, flags in arguments.models.items():
        check(f"models: {name}", flags, MODEL, files_here=False)
    return api.bind(arguments.api, arguments.models, engine.bind(arguments.engine, arguments.models))
