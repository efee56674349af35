"""Answers of the right form with wrong types, at random: each kind says so, or finds a sensible one."""

from __future__ import annotations

import copy
import json
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residency.errors import NeighborUnreachable
from residency.neighbors import KINDS, neighbor
from residency.neighbors.server import Answer, Server

INFLIGHT = json.dumps({"operation": "snapshot", "requests": []})
MODEL = {"state": "gpu", "device_bytes": 5, "leases": 0, "waiting": 0, "keep_warm_s": 600.0}
ANSWERS: dict[str, dict[str, Any]] = {
    "ollama": {"/api/ps": {"models": [{"name": "tiny", "size_vram": 5}]}},
    "comfyui": {
        "/prompt": {"exec_info": {"queue_remaining": 0}},
        "/system_stats": {"system": {"os": "posix"}, "devices": [{"type": "cuda", "torch_vram_total": 5}]},
    },
    "vllm": {"/is_sleeping": {"is_sleeping": False}, "/metrics": "vllm:num_requests_running 0\n"},
    "sglang": {
        "/server_info": {"enable_memory_saver": True, "random_seed": 7, "startup_time": {"total": 3.5}},
        "/ready": "",
        "/v1/loads": {"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0}]},
    },
    "llama-swap": {
        "/running": {"running": [{"model": "tiny", "state": "ready"}]},
        "/api/events": {"type": "inflight", "data": INFLIGHT},
    },
    "llama.cpp": {
        "/models": {"data": [{"id": "tiny", "status": {"value": "loaded"}}]},
        "/metrics": [{"is_processing": False}],
        "/slots": [{"is_processing": False}],
    },
    "sdwebui": {
        "/sdapi/v1/progress": {"state": {"job": "", "job_count": 0}},
        "/sdapi/v1/memory": {"cuda": {"reserved": {"current": 5}}},
    },
    "gpu-manager": {"/gpu/status": {"models": {"tts": MODEL, "asr": MODEL}}},
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.just("5 GB"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Returns each part of a JSON value, as its container and key."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_wrong_types_are_errors_of_the_neighbour(kind: str, data: st.DataObject) -> None:
    answers = copy.deepcopy(ANSWERS[kind])
    container, key = data.draw(st.sampled_from(places(answers)), "place")
    container[key] = data.draw(VALUES, "value")

    def exchange(_server: Server, _method: str, path: str, *_: object) -> Answer:
        answer = answers[path.partition("?")[0]]
        if path.startswith("/metrics") and kind == "llama.cpp":
            return Answer(501, b"")
        text = answer if isinstance(answer, str) else json.dumps(answer)
        return Answer(200, (f"data:{text}\n" if path == "/api/events" else text).encode("utf-8", "replace"))

    with mock.patch.object(Server, "_exchange", exchange):
        try:
            held = neighbor(kind, "http://127.0.0.1:1").held()
        except NeighborUnreachable:
            return
    assert type(held.in_use) is bool
    assert held.idle_bytes is None or type(held.idle_bytes) is int
    assert all(isinstance(model, str) for model in held.models)
