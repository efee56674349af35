"""The speech API in front of managed engines on Ray Serve.

Composition root: flags -> replicas with one managed engine each -> the FastAPI app of app.py. Deploy it with
``serve deploy deploy/ray_serve.yaml``; the names of the deployments there are ``Engine`` and ``Api``.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle

if TYPE_CHECKING:
    from fastapi import FastAPI

    from residency.cluster.replica import Answered, Asked
    from residency.launch.settings import Settings


def _settings(flags: str) -> Settings:
    from residency.launch.settings import parse

    return parse([*shlex.split(flags), "--enable-gpu-management"])


class Arguments(BaseModel):
    """``flags``: those of app.py for the engine, GPU management and the API, such as ``--gpu-keep-warm 30s``."""

    flags: str = ""


@serve.deployment
class Engine:
    """A replica with one managed engine, in a process of its own."""

    def __init__(self, flags: str) -> None:
        import app
        from residency.cluster.replica import Replica

        settings = _settings(flags)
        manager = app.make_manager(settings)
        self._replica = Replica(app.managed(settings, manager, app.choose_engine(settings)), manager)

    async def call(self, asked: Asked) -> Answered:
        """See `Replica.call`."""
        return await self._replica.call(asked)

    def check_health(self) -> None:
        """Called by Serve, which starts another replica after an error."""
        self._replica.check_health()

    def __del__(self) -> None:
        """Called by Serve before it ends the replica, after the running calls."""
        if hasattr(self, "_replica"):
            self._replica.close()


@serve.deployment
@serve.ingress()
class Api:
    """The HTTP calls of app.py under ``/v1`` and ``/docs``, in front of the replicas of `Engine`."""

    def __init__(self, flags: str, engine: DeploymentHandle[Any]) -> None:
        from residency.cluster.ray_tts import RayTTS

        self._settings = _settings(flags)
        self._engine = RayTTS(engine)
        self._folder = tempfile.mkdtemp(prefix="speech-")

    def __serve_build_asgi_app__(self) -> FastAPI:
        from residency.cluster.api import build

        return build(self._settings, self._engine, self._folder)

    def __del__(self) -> None:
        shutil.rmtree(getattr(self, "_folder", ""), ignore_errors=True)


def build(arguments: Arguments) -> serve.Application:
    """Returns the application for ``serve deploy`` and ``serve run``."""
    return Api.bind(arguments.flags, Engine.bind(arguments.flags))
