"""What is said in a recording is written into the prompt text, if that is empty."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
from app_process import ForkedApp, RunningApp
from gated_engine import close_gate, open_gate

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    (tmp_path / "gates").mkdir()
    return tmp_path / "gates"


@pytest.fixture
def app(tmp_path: Path, gates: Path) -> Iterator[RunningApp]:
    arguments = ("--enable-gpu-management", "--simulate-gpu", "48GB", "--enable-auto-transcribe")
    with ForkedApp(tmp_path / "recordings", *arguments, gates=gates) as app:
        yield app


@pytest.fixture
def page(app: RunningApp, new_page: Callable[..., Page]) -> Page:
    page = new_page()
    page.goto(app.url)
    return page


def test_an_empty_prompt_text_is_written_and_a_written_one_is_left(page: Page, app: RunningApp, tmp_path: Path) -> None:
    upload(page, tmp_path, samples=16000)
    sync_api.expect(prompt(page)).to_have_value("16000 samples")
    sync_api.expect(chip(page, "asr")).to_have_attribute("data-state", "cpu")
    sync_api.expect(chip(page, "tts")).to_have_attribute("data-state", "gpu")  # warmed: somebody is about to speak
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/transcribed.png", full_page=True)
    remove(page)
    upload(page, tmp_path, samples=8000)
    page.get_by_label("Target Text").fill("to say")
    page.get_by_role("button", name="CLONE", exact=True).click()
    sync_api.expect(page.locator("#history .bot-row")).not_to_have_count(0)
    sync_api.expect(prompt(page)).to_have_value("16000 samples")
    assert "heard: 8000" not in app.log
    assert "Traceback" not in app.log


def test_how_far_it_is_stands_in_a_line_of_its_own(page: Page, app: RunningApp, gates: Path, tmp_path: Path) -> None:
    close_gate(gates, "hear")
    upload(page, tmp_path, samples=16000)
    app.wait_for_line("at the gate: hear")
    line = page.locator("#transcribing")
    sync_api.expect(line).to_contain_text("transcribing the recording")
    assert page.locator("#prompt-text .progress-level, #prompt-text .eta-bar, #stop:visible").count() == 0
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/transcribing.png")
    open_gate(gates, "hear")
    sync_api.expect(prompt(page)).to_have_value("16000 samples")
    sync_api.expect(line).to_be_hidden()


def test_what_somebody_writes_meanwhile_stays(page: Page, app: RunningApp, gates: Path, tmp_path: Path) -> None:
    close_gate(gates, "hear")
    upload(page, tmp_path, samples=16000)
    app.wait_for_line("at the gate: hear")
    sync_api.expect(chip(page, "asr")).to_have_attribute("data-state", "gpu")
    prompt(page).fill("mine")
    open_gate(gates, "hear")
    sync_api.expect(chip(page, "asr")).to_have_attribute("data-state", "cpu")
    sync_api.expect(prompt(page)).to_have_value("mine")


def test_a_recording_that_was_taken_away_is_not_written_about(
    page: Page, app: RunningApp, gates: Path, tmp_path: Path
) -> None:
    close_gate(gates, "hear")
    upload(page, tmp_path, samples=16000)
    app.wait_for_line("at the gate: hear")
    remove(page)
    sync_api.expect(page.locator("#transcribing")).to_be_hidden()
    upload(page, tmp_path, samples=8000)
    open_gate(gates, "hear")
    sync_api.expect(prompt(page)).to_have_value("8000 samples")


def test_a_page_that_is_loaded_anew_meanwhile_gets_the_text(
    page: Page, app: RunningApp, gates: Path, tmp_path: Path
) -> None:
    close_gate(gates, "hear")
    upload(page, tmp_path, samples=16000)
    app.wait_for_line("at the gate: hear")
    page.wait_for_function("sessionStorage.getItem('inputs')?.includes('16000.wav')")
    page.reload()
    sync_api.expect(page.locator("#prompt-audio").get_by_label("Clear")).to_be_visible()
    sync_api.expect(page.locator("#transcribing")).to_contain_text(re.compile("you are next|in the queue"))
    open_gate(gates, "hear")
    sync_api.expect(prompt(page)).to_have_value("16000 samples")
    heard = app.log.count("heard:")
    prompt(page).fill("")
    page.reload()  # once it is there, it is not written again
    sync_api.expect(page.locator("#prompt-audio").get_by_label("Clear")).to_be_visible()
    page.get_by_label("Target Text").fill("to say")
    page.get_by_role("button", name="CLONE", exact=True).click()
    sync_api.expect(page.locator("#about-prompt-text")).not_to_be_empty()
    assert app.log.count("heard:") == heard


def test_an_error_is_said_and_the_text_can_be_written(page: Page, app: RunningApp, tmp_path: Path) -> None:
    upload(page, tmp_path, samples=1)
    sync_api.expect(page.locator("#about-prompt-audio")).to_contain_text("too short")
    sync_api.expect(prompt(page)).to_have_value("")
    prompt(page).fill("mine")
    assert app.get("/gpu/status")[1]["models"]["asr"]["last_error"] is None, "the model is not to blame"


def upload(page: Page, folder: Path, samples: int) -> None:
    file = folder / f"{samples}.wav"
    soundfile.write(file, np.sin(np.arange(samples) * 0.03), 16000)
    page.locator("#prompt-audio input[type=file]").set_input_files(str(file))
    sync_api.expect(page.locator("#prompt-audio").get_by_label("Clear")).to_be_visible()


def remove(page: Page) -> None:
    page.locator("#prompt-audio").get_by_label("Clear").click()


def prompt(page: Page) -> Locator:
    return page.get_by_label("Prompt Text")


def chip(page: Page, model: str) -> Locator:
    return page.locator(f"#gpu-status [data-model={model}]")
