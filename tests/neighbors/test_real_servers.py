"""Real servers on the CPU, where a variable has the command that starts one; ``{port}`` stands for its port.

``NEIGHBOR_OLLAMA="env OLLAMA_HOST=127.0.0.1:{port} ollama serve"``,
``NEIGHBOR_VLLM="python -m vllm.entrypoints.openai.api_server --model DIR --host 127.0.0.1 --port {port}"`` (and
``VLLM_SERVER_DEV_MODE=1``), ``NEIGHBOR_LLAMA_CPP="llama-server --models-dir DIR --host 127.0.0.1 --port {port}"``,
``NEIGHBOR_LLAMA_SWAP="llama-swap --config FILE --listen 127.0.0.1:{port}"``,
``NEIGHBOR_COMFYUI="python main.py --cpu --listen 127.0.0.1 --port {port}"``. All but ComfyUI need a model.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
from script_project import free_port

from residency.errors import NeighborUnreachable
from residency.neighbors import Neighbor, find, neighbor

KINDS = ("ollama", "vllm", "llama.cpp", "llama-swap", "comfyui")
LIMIT_S = 120
LONG = {"ollama": 4000, "llama.cpp": 3000, "llama-swap": 3000}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.05)


def answers(server: Neighbor) -> bool:
    try:
        server.held()
    except NeighborUnreachable:
        return False
    return True


@contextmanager
def started(kind: str) -> Iterator[tuple[int, Neighbor]]:
    command = os.environ.get(f"NEIGHBOR_{kind.upper().replace('.', '_').replace('-', '_')}")
    if not command:
        pytest.skip(f"no command for {kind}")
    port = free_port()
    process = subprocess.Popen(shlex.split(command.replace("{port}", str(port))))
    try:
        server = neighbor(kind, f"http://127.0.0.1:{port}")
        until(lambda: answers(server) or process.poll() is not None)
        assert process.poll() is None
        yield process.pid, server
    finally:
        family = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        for child in family:
            child.kill() if child.is_running() else None
        process.wait()


def call(server: Neighbor, path: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
        return json.load(response)


def complete(server: Neighbor, tokens: int) -> None:
    """Makes a request; returns when it is done."""
    if server.kind == "ollama":
        model = call(server, "/api/tags")["models"][0]["name"]
        options = {"num_predict": tokens, "temperature": 0, "repeat_penalty": 1.0}
        body = {"model": model, "prompt": "hi", "raw": True, "stream": False, "options": options}
        assert call(server, "/api/generate", body)["done"]
    elif server.kind != "comfyui":
        model = call(server, "/v1/models")["data"][0]["id"]
        body = {"model": model, "prompt": "a b", "max_tokens": tokens, "ignore_eos": True}
        assert call(server, "/v1/completions", body)["usage"]["completion_tokens"] == tokens
    else:
        workflow(server, tokens)


def workflow(server: Neighbor, tokens: int) -> None:
    image = {"width": 256, "height": 256, "batch_size": max(tokens // 25, 1), "color": tokens}
    nodes = {
        "1": {"class_type": "EmptyImage", "inputs": image},
        "2": {"class_type": "ImageBlur", "inputs": {"image": ["1", 0], "blur_radius": 31, "sigma": 10.0}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }
    prompt = call(server, "/prompt", {"prompt": nodes})["prompt_id"]
    until(lambda: prompt in call(server, "/history"))
    assert call(server, "/history")[prompt]["status"]["completed"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_server_is_found_asked_and_comes_back(kind: str) -> None:
    with started(kind) as (pid, server):
        complete(server, 4)
        until(lambda: not server.held().in_use)
        held = server.held()
        computing = psutil.Process(pid).children(recursive=True)
        users = [pid, *(process.pid for process in computing)]
        assert (users[-1], server) in find(users, own_pids=())

        seen = []
        request = threading.Thread(target=complete, args=(server, LONG.get(kind, 400)))
        request.start()
        until(lambda: bool(seen.append(server.held().in_use)) or seen[-1] or not request.is_alive())  # type: ignore[func-returns-value]
        request.join()
        assert seen[-1] or kind == "ollama"  # which does not tell

        until(lambda: not server.held().in_use)
        server.ask()
        until(lambda: server.held().idle_bytes == 0)
        assert (held.idle_bytes is None) == (kind not in ("comfyui", "ollama"))
        request = threading.Thread(target=complete, args=(server, 4))
        request.start()
        if server.gives_back:
            until(lambda: server.held().idle_bytes == 0)
            server.give_back()
        request.join()
        until(lambda: not server.held().in_use)
