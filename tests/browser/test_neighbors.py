"""The panel lists the neighbours and asks one of them at a press, on a desk and on a phone."""

from __future__ import annotations

import os
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
def app(tmp_path_factory: pytest.TempPathFactory, ollama: RecordedServer) -> Iterator[RunningApp]:
    neighbors = (f"--gpu-neighbor=ollama={ollama.url}", "--gpu-neighbor=vllm=http://127.0.0.1:9")
    arguments = ("--enable-gpu-management", "--simulate-gpu", "48GB", *neighbors)
    with ForkedApp(tmp_path_factory.mktemp("recordings"), *arguments) as app:
        yield app


@pytest.mark.parametrize(
    ("settings", "button", "answered", "unreachable"),
    [
        ({"locale": "en-US"}, "Ask to free memory", "It was asked, and has answered.", "did not answer as expected"),
        (PHONE, "请求让出显存", "已请求让出显存。", "没有给出预期的响应"),
    ],
)
def test_a_press_asks_a_neighbour(
    app: RunningApp, ollama: RecordedServer, new_page: Callable[..., Page],
    settings: dict[str, object], button: str, answered: str, unreachable: str,
) -> None:  # fmt: skip
    page = new_page(**settings)
    page.goto(app.url)
    message = sync_api.expect(page.locator("#gpu-message"))
    buttons = page.locator("#gpu-status [data-neighbor]")
    sync_api.expect(buttons).to_have_count(2)
    asked = len(ollama.calls)
    buttons.first.click()
    message.to_have_text(answered)
    assert any(call.startswith("POST /api/generate") for call in ollama.calls[asked:])
    sync_api.expect(page.locator(".gpu-neighbor").first).to_contain_text("llama3.2:latest")
    sync_api.expect(buttons.last).to_contain_text(button)
    buttons.last.click()
    message.to_contain_text(unreachable)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if folder := os.environ.get("SCREENSHOTS"):
        page.locator("#gpu-panel").screenshot(path=f"{folder}/neighbors-{button[:3]}.png")
