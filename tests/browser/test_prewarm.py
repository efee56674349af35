"""Before anybody asks for speech: the page brings the model back, and says how far it has come."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from app_process import ForkedApp, RunningApp
from gated_engine import close_gate, open_gate
from recordings import write_tone

from residency.web.ui.prewarm import EVERY_S

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    (tmp_path / "gates").mkdir()
    close_gate(tmp_path / "gates", "load")
    return tmp_path / "gates"


@pytest.fixture
def app(tmp_path: Path, gates: Path) -> Iterator[RunningApp]:
    arguments = ("--enable-gpu-management", "--simulate-gpu", "48GB", "--shutdown-grace", "0")
    with ForkedApp(tmp_path / "recordings", *arguments, gates=gates) as app:
        yield app


@pytest.fixture
def page(app: RunningApp, new_page: Callable[..., Page]) -> Page:
    page = new_page()
    page.goto(app.url)
    expect_state(page, "released")
    return page


@pytest.mark.parametrize("act", ["press into", "upload"])
def test_who_is_about_to_ask_finds_the_model_on_the_gpu(
    page: Page, app: RunningApp, gates: Path, tmp_path: Path, act: str
) -> None:
    if act == "press into":
        page.get_by_label("Target Text").click()
    else:
        page.locator("#prompt-audio input[type=file]").set_input_files(recording(tmp_path))
    app.wait_for_line("at the gate: load")
    expect_state(page, "moving")
    sync_api.expect(page.locator("#gpu-status .gpu-course")).to_contain_text("To the simulated GPU: ")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/intent-{act.replace(' ', '-')}.png", full_page=True)
    # Nothing on the page waits for it.
    page.get_by_label("Target Text").fill("to say")
    open_gate(gates, "load")
    expect_state(page, "gpu")
    sync_api.expect(page.locator("#gpu-status .gpu-course")).to_contain_text("to main memory in")
    assert app.model()["leases"] == 0
    assert "Traceback" not in app.log


def test_who_waits_for_the_model_reads_what_it_does(page: Page, app: RunningApp, gates: Path, tmp_path: Path) -> None:
    page.locator("#prompt-audio input[type=file]").set_input_files(recording(tmp_path))
    sync_api.expect(page.locator("#prompt-audio").get_by_label("Clear")).to_be_visible()
    page.get_by_label("Prompt Text").fill("said")
    page.get_by_label("Target Text").fill("to say")
    page.get_by_role("button", name="CLONE", exact=True).click()
    app.wait_for_line("at the gate: load")
    sync_api.expect(page.locator("#progress")).to_contain_text("To the simulated GPU: ")
    sync_api.expect(page.locator("#gpu-status")).to_contain_text("1 waiting")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/waiting.png", full_page=True)
    open_gate(gates, "load")
    sync_api.expect(page.locator("#history .bot-row")).not_to_have_count(0)
    expect_state(page, "cpu")


def test_typing_sends_no_request_for_each_key(page: Page, gates: Path) -> None:
    box = page.get_by_label("Target Text")
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    began_s = time.monotonic()
    box.press_sequentially("a text of forty keys, one after another.", delay=60)
    took_s = time.monotonic() - began_s
    assert 1 <= len(sent) <= 2 + took_s / EVERY_S
    open_gate(gates, "load")
    expect_state(page, "gpu")


def recording(folder: Path) -> str:
    return write_tone(folder / "prompt.wav")


def expect_state(page: Page, state: str) -> None:
    chip = page.locator("#gpu-status [data-model=tts]")
    sync_api.expect(chip).to_have_attribute("data-state", state)
