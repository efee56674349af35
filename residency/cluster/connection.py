"""Connects a program to the replicas of a running Ray Serve."""

from __future__ import annotations

import logging
import signal
import socket

from ..errors import EngineUnavailable, needing
from .ray_tts import RayTTS

APPLICATION, ENGINE, API = "tts", "Engine", "Api"
"""Names of the application and its deployments, in deploy/ray_serve.yaml and deploy/ray_serve.py."""

ANSWERED_WITHIN_S = 30.0


def connect(address: str) -> RayTTS:
    """Returns the first model of the replicas. ``address`` is that of the cluster, see ``ray.init``.

    Raises `EngineUnavailable` without a cluster, or without the application on it.
    """
    with needing("ray"):
        import ray
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException
    before = signal.getsignal(signal.SIGTERM)
    try:
        host, _, port = address.rpartition(":")
        if port.isdecimal():  # Ray itself tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), ANSWERED_WITHIN_S).close()
        ray.init(address, namespace="serve", log_to_driver=False, logging_level=logging.WARNING)
        api = serve.get_deployment_handle(API, APPLICATION)
        models: dict[str, bool] = api.models.remote().result(timeout_s=ANSWERED_WITHIN_S)
        replicas = serve.get_deployment_handle(ENGINE, APPLICATION)
    except (RayError, RayServeException, OSError, ValueError, RuntimeError) as error:
        raise EngineUnavailable(
            f"No replicas at --ray-address {address} ({error}): start Ray, and deploy them (serve deploy "
            f"deploy/ray_serve.yaml)",
            f"在 --ray-address {address} 未找到副本（{error}）：请启动 Ray 并部署副本（serve deploy "
            f"deploy/ray_serve.yaml）",
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray sets one of its own
    return RayTTS(replicas, *next(iter(models.items())))
