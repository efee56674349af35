"""The first minutes with the page: what it explains, a voice to try, and words that people know."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from app_process import ForkedApp, RunningApp
from gated_engine import close_gate, open_gate

from residency.web.speech.sample_voices import TARGET_TEXT, VOICES
from residency.web.speech.task_names import STEP_AUDIO_EDIT_TYPES

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

ARGUMENTS = ("--enable-gpu-management", "--simulate-gpu", "64MB")
#: The engine of the gates says that it does what the real one does, and speaks what the built-in one does. Each key
#: that is pressed warms it.
PRETENDING = """
import sys
sys.path.insert(0, "tests/support")
import gated_engine
from residency.web.speech.task_names import STEP_AUDIO_EDIT_TYPES
gated_engine.supported_edit_types = lambda: STEP_AUDIO_EDIT_TYPES
import residency.web.ui.prewarm
residency.web.ui.prewarm.EVERY_S = 0
"""


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, gates: Path) -> Iterator[RunningApp]:
    with ForkedApp(tmp_path_factory.mktemp("recordings"), *ARGUMENTS, prelude=PRETENDING, gates=gates) as app:
        yield app


def test_each_sample_voice_can_be_cloned_at_once(new_page: Callable[..., Page], tmp_path: Path) -> None:
    pytest.importorskip("hibari")
    with ForkedApp(tmp_path, *ARGUMENTS) as app:
        page = new_page(viewport={"width": 1280, "height": 800})
        page.goto(app.url)
        screenshot(page, "first-use")
        for sample, voice in VOICES.items():
            page.locator(f"#sample-{sample}").click()
            sync_api.expect(text(page, "prompt-text")).to_have_value(voice.says)
            sync_api.expect(text(page, "target-text")).to_have_value(TARGET_TEXT)
            sync_api.expect(page.locator("#prompt-audio").get_by_label("Clear")).to_be_visible()
            page.get_by_role("button", name="CLONE", exact=True).click()
            sync_api.expect(page.locator("#history .bot-row").first).to_contain_text(TARGET_TEXT)
            sync_api.expect(page.locator("#message")).to_have_text("")
            screenshot(page, f"cloned-{sample}")
            page.get_by_role("button", name="Clear History").click()
            sync_api.expect(page.locator("#history .bot-row")).to_have_count(0)
        assert "Traceback" not in app.log


def test_a_sample_leaves_a_target_text_alone(app: RunningApp, new_page: Callable[..., Page]) -> None:
    page = new_page()
    page.goto(app.url)
    text(page, "target-text").fill("mine")
    page.locator("#sample-low").click()
    sync_api.expect(text(page, "prompt-text")).to_have_value(VOICES["low"].says)
    sync_api.expect(text(page, "target-text")).to_have_value("mine")


@pytest.mark.parametrize(
    ("locale", "words", "tasks", "sub_tasks", "line"),
    [
        (
            "en-US",
            ["The exact words of the recording", "Sample: a higher voice"],
            ["clone", "emotion", "style", "cut pauses (vad)", "reduce noise (denoise)"],
            ["happy", "embarrassed (embarrass)", "no emotion (remove)"],
            "Says the same with this emotion: sad.",
        ),
        (
            "zh-CN",
            ["录音中所说的话", "示例：较高的声音"],
            ["克隆音色（clone）", "情绪（emotion）", "风格（style）", "去除停顿（vad）", "降噪（denoise）"],
            ["高兴（happy）", "尴尬（embarrass）", "去除情绪（remove）"],
            "内容不变，情绪变为：悲伤。",
        ),
    ],
)
def test_tasks_and_fields_are_explained_in_the_language_of_the_page(
    app: RunningApp,
    new_page: Callable[..., Page],
    locale: str,
    words: list[str],
    tasks: list[str],
    sub_tasks: list[str],
    line: str,
) -> None:
    page = new_page(locale=locale)
    page.goto(app.url)
    page.wait_for_function("window.keepsInputs")  # by then tasks have their names
    for word in words:
        sync_api.expect(page.locator("body")).to_contain_text(word)
    for field in ("prompt-text", "target-text"):
        placeholder = text(page, field).get_attribute("placeholder") or ""
        assert (re.search("[\u4e00-\u9fff]", placeholder) is not None) == (locale == "zh-CN")
        assert placeholder
    sync_api.expect(page.locator("#task input")).to_have_value(tasks[0])
    assert set(tasks) < set(options(page, "task", len(STEP_AUDIO_EDIT_TYPES)))
    page.get_by_role("option", name=tasks[1], exact=True).click()
    sync_api.expect(page.locator("#sub-task input")).to_have_value(sub_tasks[0])
    assert set(sub_tasks) < set(options(page, "sub-task", len(STEP_AUDIO_EDIT_TYPES["emotion"])))
    page.get_by_role("option", name=re.compile("sad")).click()
    sync_api.expect(page.locator("#task-line")).to_have_text(line)


@pytest.mark.parametrize(("locale", "said"), [("en-US", "speaks English only"), ("zh-CN", "内置引擎只会说英语")])
def test_a_sentence_in_another_language_is_refused_before_the_engine_is_loaded(
    app: RunningApp, new_page: Callable[..., Page], gates: Path, locale: str, said: str
) -> None:
    app.post("/gpu/release", {})
    close_gate(gates, "load")
    page = new_page(locale=locale)
    page.goto(app.url)
    page.locator("#sample-high").click()
    sync_api.expect(text(page, "prompt-text")).to_have_value(VOICES["high"].says)
    text(page, "target-text").fill("你好，世界")
    page.get_by_role("button", name="CLONE", exact=True).click()
    message = page.locator("#about-target-text [role=alert]")
    sync_api.expect(message).to_contain_text(said)
    assert app.model()["state"] in ("released", "moving"), "the page warms the engine for who writes"
    assert app.model()["waiting"] == 0
    assert (re.search("speaks English", message.inner_text()) is None) == (locale == "zh-CN")
    app.wait_for_line("at the gate: load")
    app.forget_log()
    open_gate(gates, "load")


def options(page: Page, element: str, count: int) -> list[str]:
    page.locator(f"#{element} input").click()
    shown = page.get_by_role("option")
    sync_api.expect(shown).to_have_count(count)
    return [name.removeprefix("✓").strip() for name in shown.all_inner_texts()]


def text(page: Page, element: str) -> Locator:
    return page.locator(f"#{element}").locator("input, textarea")


def screenshot(page: Page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)
