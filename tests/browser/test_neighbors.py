"""The panel lists the neighbours and asks one of them at a press, on a desk and on a phone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from app_process import ForkedApp, RunningApp
from recorded_server import RecordedServer, Reply, recorded

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Page

LOADED = {"models": [{"name": "llama3.2:latest", "model": "llama3.2:latest", "size_vram": 3_400_000_000}]}
PHONE = {"viewport": {"width": 390, "height": 844}, "locale": "zh-CN"}


@pytest.fixture(scope="module")
def ollama() -> Iterator[RecordedServer]:
    with recorded({"GET /api/ps": Reply(LOADED), "POST /api/generate": Reply({"done": True})}) as server:
        yield server


@pytest.fixture(scope="module")
def comfyui() -> Iterator[RecordedServer]:
    """One that computes."""
    stats = {"system": {"os": "linux"}, "devices": [{"type": "cuda", "torch_vram_total": 3_400_000_000}]}
    busy = {"GET /prompt": Reply({"exec_info": {"queue_remaining": 1}}), "GET /system_stats": Reply(stats)}
    with recorded(busy) as server:
        yield server


@pytest.fixture(scope="module")
def app(
    tmp_path_factory: pytest.TempPathFactory, ollama: RecordedServer, comfyui: RecordedServer
) -> Iterator[RunningApp]:
    urls = (f"ollama={ollama.url}", f"comfyui={comfyui.url}", "vllm=http://127.0.0.1:9")
    arguments = ("--enable-gpu-management", "--simulate-gpu", "48GB", *(f"--gpu-neighbor={each}" for each in urls))
    with ForkedApp(tmp_path_factory.mktemp("recordings"), *arguments) as app:
        yield app


ENGLISH: dict[str, object] = {"locale": "en-US"}


@pytest.mark.parametrize(
    ("settings", "button", "answered", "in_use", "unreachable"),
    [
        (ENGLISH, "Ask to free memory", "It was asked, and has answered.",
         "comfyui at {url} is in use: it is not asked now",
         "The GPU server vllm at http://127.0.0.1:9 did not answer as expected: "),
        (PHONE, "请求让出显存", "已请求让出显存。", "{url} 的 comfyui 正在使用中：现在不会请求它",
         "GPU 服务 vllm（http://127.0.0.1:9）没有给出预期的响应："),
    ],
)  # fmt: skip
def test_a_press_asks_a_neighbour(
    app: RunningApp, ollama: RecordedServer, comfyui: RecordedServer, new_page: Callable[..., Page],
    settings: dict[str, object], button: str, answered: str, in_use: str, unreachable: str,
) -> None:  # fmt: skip
    page = new_page(**settings)
    page.goto(app.url)
    message = sync_api.expect(page.locator("#gpu-message"))
    buttons = page.locator("#gpu-status [data-neighbor]")
    sync_api.expect(buttons).to_have_count(3)
    asked = len(ollama.calls)
    buttons.first.click()
    message.to_have_text(answered)
    assert any(call.startswith("POST /api/generate") for call in ollama.calls[asked:])
    sync_api.expect(page.locator(".gpu-neighbor").first).to_contain_text("llama3.2:latest")
    sync_api.expect(buttons.last).to_contain_text(button)
    buttons.nth(1).click()
    message.to_have_text(in_use.format(url=comfyui.url))
    assert "POST /free" not in str(comfyui.calls)
    buttons.last.click()
    message.to_contain_text(unreachable)
    message.not_to_contain_text(re.compile(" / "))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if folder := os.environ.get("SCREENSHOTS"):
        page.locator("#gpu-panel").screenshot(path=f"{folder}/neighbors-{button[:3]}.png")


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        (ENGLISH, "The GPU server ollama at {url} refused: "),
        (PHONE, "GPU 服务 ollama（{url}）拒绝了请求："),
    ],
)
def test_a_neighbour_that_refuses_is_named(
    app: RunningApp, ollama: RecordedServer, new_page: Callable[..., Page], settings: dict[str, object], refused: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(ollama.replies, "POST /api/generate", Reply({"error": "<b>no</b>"}, 500))
    page = new_page(**settings)
    page.goto(app.url)
    message = sync_api.expect(page.locator("#gpu-message"))
    page.locator("#gpu-status [data-neighbor]").first.click()
    message.to_contain_text(refused.format(url=ollama.url))
    message.to_contain_text("<b>no</b>")
    message.not_to_contain_text(re.compile(" / "))
