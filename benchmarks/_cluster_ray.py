"""Requests to the speech API on a local Ray of two nodes, as processes here."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster

from deploy.ray_serve import Api, Arguments, Engine, bound
from residency.cluster.replica import Answered, Asked
from residency.web.speech.sample_voices import FOLDER, VOICES

ROOT = Path(__file__).resolve().parent.parent
TEXT = "It will be cloudy in the north, with a little rain."
SLEEP_S, SAMPLE_RATE, ATTEMPTS = 0.5, 24_000, 5
RETRIED = (429, 500, 502, 503)


@serve.deployment(name="Engine")
class Sleeping:
    """An engine that sleeps instead of computing, one call at a time: so replicas do not share the cores."""

    def __init__(self, flags: str, models: dict[str, str]) -> None:
        self._turn = asyncio.Lock()

    async def call(self, asked: Asked, recording: object) -> Answered:
        async with self._turn:
            await asyncio.sleep(SLEEP_S if asked.arguments[-1] == TEXT else 0)
        return Answered(np.zeros(SAMPLE_RATE, np.float32), SAMPLE_RATE)


@dataclass(frozen=True)
class Measured:
    """Of some requests: seconds of each, of all together, and how many were sent again."""

    seconds: list[float]
    whole_s: float
    retries: int

    def percentile(self, share: int) -> float:
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[share - 1]


@contextmanager
def local_ray() -> Iterator[str]:
    """Starts Ray with two nodes, and Serve; yields the URL of Serve."""
    os.environ |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    node: dict[str, Any] = {"num_cpus": 8, "object_store_memory": 200 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()
    finally:
        cluster.shutdown()


def deploy(engine: str, replicas: int | None) -> None:
    """Deploys as deploy/ray_serve.yaml does, but with a fixed number of replicas; None: from zero, as there."""
    file = yaml.safe_load((ROOT / "deploy/ray_serve.yaml").read_text(encoding="utf-8"))
    api, its = ({k: v for k, v in each.items() if k != "name"} for each in file["applications"][0]["deployments"])
    if replicas is not None:
        del its["autoscaling_config"]
        its["num_replicas"] = replicas
    its["ray_actor_options"] = {"num_cpus": 1}
    kind = Sleeping if engine == "sleep" else Engine
    arguments = Arguments(engine="--gpu-keep-warm -1")
    serve.run(bound(arguments, kind.options(**its), Api.options(**api)), name="tts", route_prefix="/")


def speak(url: str, text: str) -> int:
    """Sends a request until it is answered; returns how often it was sent again."""
    body = json.dumps({"input": text, "voice": "high", "response_format": "wav"}).encode()
    request = urllib.request.Request(f"{url}/v1/audio/speech", body, {"content-type": "application/json"})
    for retries in range(ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                assert len(response.read()) > 1000
                return retries
        except urllib.error.HTTPError as error:
            if error.code not in RETRIED:
                raise
            print(f"sent again: {error}", file=sys.stderr)
        except OSError as error:
            print(f"sent again: {error}", file=sys.stderr)
        time.sleep(0.5)
    raise RuntimeError("a request was not answered")


def from_zero_s(url: str) -> float:
    """Returns the seconds to the first answer of the built-in engine, from no replica on."""
    deploy("builtin", None)
    began_s = time.perf_counter()
    speak(url, TEXT)
    return time.perf_counter() - began_s


def throughput(url: str, engine: str, replicas: int, requests: int, clients: int) -> Measured:
    """Sends the requests by ``clients`` threads, after as many as load the model in each replica."""
    deploy(engine, replicas)

    def one(_: int) -> tuple[float, int]:
        began_s = time.perf_counter()
        retries = speak(url, TEXT)
        return time.perf_counter() - began_s, retries

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(4 * replicas)))
        began_s = time.perf_counter()
        answers = list(pool.map(one, range(requests)))
        whole_s = time.perf_counter() - began_s
    return Measured([took_s for took_s, _ in answers], whole_s, sum(retries for _, retries in answers))


def overhead(url: str, engine: str, pairs: int) -> tuple[list[float], list[float]]:
    """Returns the seconds of requests, and of the same calls by the driver to the replica; alternately, one at a time.

    The engine that sleeps answers these at once.
    """
    deploy(engine, 1)
    text = "It will rain." if engine == "sleep" else TEXT
    voice = FOLDER / VOICES["high"].file
    asked = Asked("clone", voice.suffix, (VOICES["high"].says, text))
    recording = ray.put(np.fromfile(voice, np.uint8))
    handle = serve.get_deployment_handle("Engine", "tts").options(multiplexed_model_id="builtin")
    by_http, direct = [], []
    for number in range(pairs + 3):
        began_s = time.perf_counter()
        speak(url, text)
        between_s = time.perf_counter()
        answered: Answered = handle.call.remote(asked, recording).result()
        assert answered.error is None, answered.error
        if number >= 3:  # the first ones load the model and open connections
            by_http.append(between_s - began_s)
            direct.append(time.perf_counter() - between_s)
    return by_http, direct
