"""The panel of an app with ``--gpu-isolation process``, in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from app_process import RunningApp

if TYPE_CHECKING:
    from playwright.sync_api import Page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

FLAGS = ("--enable-gpu-management", "--simulate-gpu", "4GB,context=1GB", "--gpu-keep-warm", "-1")


def test_an_open_page_follows_the_context_of_a_worker_until_its_release(
    new_page: Callable[..., Page], tmp_path: Path
) -> None:
    with RunningApp(tmp_path, *FLAGS, "--gpu-isolation", "process", "--gpu-residue", "keep") as app:
        pages = {language: new_page(locale=language) for language in ("en", "zh-CN")}
        for page in pages.values():
            page.goto(app.url)
        english, chinese = (page.locator("#gpu-panel") for page in pages.values())
        share = "part => part.style.width"
        sync_api.expect(english).to_contain_text("nothing of it is on the simulated GPU")
        app.post("/gpu/warm", {})
        for panel, words in ((english, "Context and workspaces 1 GB"), (chinese, "上下文与工作区 1 GB")):
            sync_api.expect(panel.locator(".gpu-legend [data-part=context]")).to_have_text(words)
            assert panel.locator("i[data-part=context]").evaluate(share) == "25%"
        pid = app.model()["worker"]["pid"]
        sync_api.expect(english).to_contain_text(f"pid {pid}")
        app.post("/gpu/offload", {})
        sync_api.expect(english).to_contain_text("keeps 1 GB on the simulated GPU")
        sync_api.expect(chinese).to_contain_text("在模拟 GPU 上仍占 1 GB")
        app.post("/gpu/release", {})
        sync_api.expect(english).to_contain_text("nothing of it is on the simulated GPU")
        sync_api.expect(chinese).to_contain_text("模拟 GPU 上没有它的任何内容")
        sync_api.expect(english.locator(".gpu-device")).to_contain_text("0 B of 4 GB used")
        assert english.locator("i[data-part=context]").evaluate(share) == "0%"
