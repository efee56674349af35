"""The panel tells for whom models left the card, who waits for it, and which neighbours can be asked."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import Workshop
from recorded_server import Reply, recorded
from starlette.testclient import TestClient

from gpu_manager import GPUResourceManager, Sharing, SimulatedDevice
from residency.sentences import Sentence
from residency.status_types import MoveProgress
from residency.web.api.control import build
from residency.web.api.metrics import exposition
from residency.web.server.permissions import Permissions
from residency.web.shared.language import en, zh
from residency.web.ui import sharing_views, status_text
from residency.web.ui.gpu_panel import GpuPanel

GB = 1 << 30
LOADED = {"models": [{"name": "llama<3>", "model": "llama<3>", "size_vram": 3 * GB}]}


@pytest.fixture
def shared(manager: GPUResourceManager) -> Any:
    status: Any = manager.status()
    status["device"]["free_bytes"] = 8 * GB
    status["sharing"] = {
        "headroom_bytes": 0,
        "yields": 2,
        "last_yield": {"ago_s": 300.0, "pid": 77, "name": "<comfy>", "bytes": 40 * GB, "models": ["tts"]},
        "peers": [],
        "holders": [{"pid": 77, "name": "<comfy>", "bytes": 30 * GB}, {"pid": 78, "name": "?", "bytes": None}],
        "neighbors": [],
        "queue": [
            {"model": "tts", "pid": 1, "wanted_bytes": GB, "waited_s": 9.0, "claimed": True},
            {"model": "asr", "pid": 2, "wanted_bytes": 40 * GB, "waited_s": 3.0, "claimed": False},
            {"model": "", "pid": 77, "wanted_bytes": 0, "waited_s": 2.0, "claimed": False},
        ],
    }
    return status


def test_a_card_that_is_not_shared_has_no_line(manager: GPUResourceManager) -> None:
    assert sharing_views.sharing_html(manager.status(), en) == ""
    assert not [line for line in exposition(manager).decode().splitlines() if "yields" in line or "room_" in line]


def test_it_tells_for_whom_models_left_and_what_waits(shared: Any) -> None:
    assert sharing_views.yielded(shared["sharing"], en) == (
        "Left the card for others, 2×; last 5 min ago for <comfy> (77): 40 GB (tts)"
    )
    assert sharing_views.yielded(shared["sharing"], zh) == (
        "已为其他进程让出显存 2 次；上次在 5 min 前，为<comfy>（77）让出 40 GB（tts）"
    )
    assert sharing_views.waiting(shared, en) == [
        "Waiting for room, place 1: asr (2): needs 40 GB, 8 GB free, for 3 s",
        "Waiting for room, place 2: another process (77): for 2 s",
        "Held by others: <comfy> (77) 30 GB, ? (78) ?",
    ]
    assert sharing_views.waiting(shared, zh)[0] == "等待显存，第 1 位：asr（2）：需要 40 GB，空闲 8 GB，已等待 3 s"
    assert "&lt;comfy&gt; (77)" in sharing_views.sharing_html(shared, en)
    shared["sharing"]["last_yield"] |= {"name": "", "pid": None}
    assert "for other processes: 40 GB" in sharing_views.yielded(shared["sharing"], en)


def test_a_move_that_waits_for_room_says_so() -> None:
    move: MoveProgress = {
        "to": "gpu", "phase": "waiting", "bytes": 0, "total_bytes": 40 * GB, "seconds": 1.0, "bytes_per_s": None,
    }  # fmt: skip
    assert status_text.moving(move, "cuda", en) == "To the GPU: waiting for room · 40 GB"
    assert status_text.moving(move, "cuda", zh) == "正在移至显存：等待其他进程让出显存 · 40 GB"


def test_a_neighbour_has_a_button(shared: Any) -> None:
    shared["sharing"]["neighbors"] = [
        {"kind": "ollama", "url": "http://127.0.0.1:1/'", "pid": 5, "in_use": False, "idle_bytes": 3 * GB,
         "models": ["llama<3>"], "asked_ago_s": 4.0, "answer": Sentence("It is <gone>", "它已退出")},
        {"kind": "vllm", "url": "http://127.0.0.1:2", "pid": None, "in_use": None, "idle_bytes": None,
         "models": [], "asked_ago_s": None, "answer": None},
    ]  # fmt: skip
    html = sharing_views.sharing_html(shared, en)
    assert "data-neighbor='http://127.0.0.1:1/&#x27;'>Ask to free memory<" in html
    assert "idle · could free 3 GB · llama&lt;3&gt; · asked 4 s ago" in html
    assert "It is &lt;gone&gt;" in html
    assert "它已退出" in sharing_views.sharing_html(shared, zh)
    assert "data-neighbor='http://127.0.0.1:2'>请求让出显存<" in sharing_views.sharing_html(shared, zh)


def test_a_neighbour_is_asked_over_http_by_those_who_may(workshop: Workshop) -> None:
    replies = {"GET /api/ps": Reply(LOADED), "POST /api/generate": Reply({"done": True})}
    with recorded(replies) as ollama:
        sharing = Sharing(neighbors=(f"ollama={ollama.url}",))
        with GPUResourceManager(SimulatedDevice(GB), sharing=sharing, adopt=workshop.adopt) as manager:
            manager.register("tts", workshop.load)
            app = build(manager, Permissions("secret"))
            web = TestClient(app, "http://127.0.0.1:7860", client=("127.0.0.1", 4000))
            assert TestClient(app).post("/gpu/neighbors/ask", json={"url": ollama.url}).status_code == 401
            assert ollama.calls == []
            answer = web.post("/gpu/neighbors/ask", json={"url": ollama.url})
            assert answer.status_code == 200
            assert answer.json()["sharing"]["neighbors"][0]["models"] == ["llama<3>"]
            assert any(call.startswith("POST /api/generate") for call in ollama.calls)
            assert web.post("/gpu/neighbors/ask", json={"url": "http://127.0.0.1:9"}).status_code == 404
            assert web.post("/gpu/neighbors/ask", json={}).status_code == 422
            ollama.replies.clear()
            assert web.post("/gpu/neighbors/ask", json={"url": ollama.url}).status_code == 502
            panel: Any = GpuPanel(manager, Permissions()).news(en)
            assert ollama.url in panel["pieces"]["sharing"]
            shown = exposition(manager).decode()
            assert "gpu_manager_yields_total 0.0" in shown
            assert "gpu_manager_room_waiting 0.0" in shown
    assert TestClient(build(manager, Permissions("x"))).post("/gpu/neighbors/ask").status_code == 401


def test_without_neighbours_each_address_is_unknown(manager: GPUResourceManager) -> None:
    web = TestClient(build(manager, Permissions()), "http://127.0.0.1:7860", client=("127.0.0.1", 4000))
    assert web.post("/gpu/neighbors/ask", json={"url": "http://127.0.0.1:1"}).status_code == 404
