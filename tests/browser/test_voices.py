"""Voices on the page: chosen from a list, stored from a recording, deleted; and CLONE + EDIT with one of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from app_process import ForkedApp, RunningApp, wait_until
from recordings import write_tone

from residency.web.speech.sample_voices import VOICES

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Dialog, Locator, Page, Response

#: The engine of the gates says that it does what the real one does.
PRETENDING = """
import sys
sys.path.insert(0, "tests/support")
import gated_engine
from residency.web.speech.task_names import STEP_AUDIO_EDIT_TYPES
gated_engine.supported_edit_types = lambda: STEP_AUDIO_EDIT_TYPES
"""
PHONE = {"viewport": {"width": 390, "height": 844}}


@pytest.fixture
def voices(tmp_path: Path) -> Path:
    return tmp_path / "voices"


@pytest.fixture
def app(tmp_path: Path, voices: Path) -> Iterator[RunningApp]:
    (tmp_path / "gates").mkdir()
    arguments = ("--enable-gpu-management", "--simulate-gpu", "64MB", "--voices-dir", str(voices))
    with ForkedApp(tmp_path / "recordings", *arguments, gates=tmp_path / "gates", prelude=PRETENDING) as app:
        yield app
        assert "Traceback" not in app.log


def opened(page: Page, app: RunningApp) -> Page:
    page.goto(app.url)
    page.wait_for_function("window.keepsInputs")
    return page


def text(page: Page, element: str) -> Locator:
    return page.locator(f"#{element}").locator("input, textarea").first


def is_answer(response: Response) -> bool:
    """Whether this is the answer to an event."""
    return response.request.method == "POST" and "gradio_api" in response.url


def choose(page: Page, name: str) -> None:
    text(page, "voice").click()
    page.get_by_role("option", name=name).click()


def expect_options(page: Page, *names: str) -> None:
    """Opens the list, compares it, and closes it.

    Again, if it differs: Gradio 5 shows only the chosen voice in a list that has changed when it is opened.
    """
    titles = [re.compile(rf"{name}\s*$") for name in names]

    def shown() -> bool:
        text(page, "voice").click()
        try:
            sync_api.expect(page.get_by_role("option")).to_have_text(titles, timeout=2000)
        except AssertionError:
            return False
        finally:
            text(page, "target-text").focus()
        return True

    assert wait_until(shown)


def upload(page: Page, recording: str, words: str) -> None:
    page.locator("#prompt-audio input[type=file]").set_input_files(recording)
    sync_api.expect(page.locator("#new-voice")).to_be_visible()
    text(page, "prompt-text").fill(words)


def save(page: Page, name: str) -> None:
    text(page, "voice-name").fill(name)
    page.locator("#save-voice").click()


SAMPLES = {
    "en-US": ("Sample: a higher voice", "Sample: a lower voice"),
    "zh-CN": ("示例：较高的声音", "示例：较低的声音"),
}
WORDS = {
    "en-US": ("is stored", "is deleted", "Delete the voice “Ada”", "Voice 1", "exists already", "clone", "emotion"),
    "zh-CN": ("已保存", "已删除", "删除声音“Ada”", "声音 1", "已有名为", "克隆音色", "情绪"),
}


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
@pytest.mark.parametrize("size", [{}, PHONE], ids=["desk", "phone"])
def test_a_voice_is_stored_found_again_spoken_with_and_deleted(
    app: RunningApp, voices: Path, new_page: Callable[..., Page], tmp_path: Path, locale: str, size: dict[str, object]
) -> None:
    stored, deleted, question, numbered, exists, clone, emotion = WORDS[locale]
    page = opened(new_page(locale=locale, **size), app)
    sync_api.expect(page.locator("#new-voice")).to_be_hidden()
    expect_options(page, *SAMPLES[locale])
    upload(page, write_tone(tmp_path / "mine.wav"), "my words")
    save(page, "Ada")
    said = page.locator("#about-voice-name [role=status]")
    sync_api.expect(said).to_contain_text(stored)
    sync_api.expect(text(page, "voice")).to_have_value("Ada")
    sync_api.expect(text(page, "voice-name")).to_have_value("")
    assert [folder.name for folder in voices.iterdir()] == ["Ada"]
    screenshot(page, f"voice-stored-{locale}-{'phone' if size else 'desk'}")
    save(page, "high")
    sync_api.expect(page.locator("#about-voice-name [role=alert]")).to_contain_text(exists)
    sync_api.expect(text(page, "voice-name")).to_have_attribute("aria-describedby", "about-voice-name")

    # Another page, and this one after a reload.
    other = opened(new_page(locale=locale, **size), app)
    other.reload()
    other.wait_for_function("window.keepsInputs")
    expect_options(other, *SAMPLES[locale], "Ada")
    choose(other, "Ada")
    sync_api.expect(text(other, "prompt-text")).to_have_value("my words")
    sync_api.expect(
        other.locator("#prompt-audio").get_by_label("Clear" if locale == "en-US" else "清除")
    ).to_be_visible()
    sync_api.expect(text(other, "target-text")).to_have_value("")
    text(other, "target-text").fill("to say")
    other.locator("#clone").click()
    sync_api.expect(other.locator("#history .bot-row")).to_have_count(1)
    assert app.wait_for_line("spoken: my words to say")
    sync_api.expect(other.locator("#clone-edit")).to_be_hidden()
    text(other, "task").click()
    other.get_by_role("option", name=emotion).click()
    other.locator("#clone-edit").click()
    sync_api.expect(other.locator("#history .bot-row")).to_have_count(2)
    sync_api.expect(other.locator("#history .user-row")).to_contain_text([clone, emotion])
    screenshot(other, f"clone-edit-{locale}-{'phone' if size else 'desk'}")

    # One without a name; the first page learns of it when its list is opened.
    page.locator("#save-voice").scroll_into_view_if_needed()
    save(other, "")
    sync_api.expect(text(other, "voice")).to_have_value(numbered)
    expect_options(page, *SAMPLES[locale], "Ada", numbered)
    questions = list[str]()

    def answer(yes: bool) -> Callable[[Dialog], None]:
        return lambda dialog: (questions.append(dialog.message), dialog.accept() if yes else dialog.dismiss())[1]

    for yes in (False, True):
        page.once("dialog", answer(yes))
        page.locator("#delete-voice").click()
        if not yes:
            expect_options(page, *SAMPLES[locale], "Ada", numbered)
    sync_api.expect(page.locator("#about-voice [role=status]")).to_contain_text(deleted)
    assert all(question in each for each in questions)
    sync_api.expect(page.locator("#delete-voice")).to_be_hidden()
    expect_options(page, *SAMPLES[locale], numbered)
    assert [folder.name for folder in voices.iterdir()] == [numbered]


def test_the_list_closed_without_a_choice_changes_nothing(app: RunningApp, new_page: Callable[..., Page]) -> None:
    page = opened(new_page(), app)
    choose(page, "lower")
    sync_api.expect(text(page, "prompt-text")).to_have_value(VOICES["low"].says)
    text(page, "prompt-text").fill("other words")
    expect_options(page, *SAMPLES["en-US"])
    page.locator("#sample-high").click()
    sync_api.expect(text(page, "voice")).to_have_value(SAMPLES["en-US"][0])
    text(page, "prompt-text").fill("other words")
    with page.expect_response(is_answer):  # of the closed list, which has been answered before the press
        expect_options(page, *SAMPLES["en-US"])
    save(page, "Ada")
    sync_api.expect(text(page, "voice")).to_have_value("Ada")
    sync_api.expect(text(page, "prompt-text")).to_have_value("other words")
    page.locator("#prompt-audio").get_by_label("Clear").click()
    sync_api.expect(text(page, "voice")).to_have_value("")
    sync_api.expect(page.locator("#delete-voice")).to_be_hidden()
    choose(page, "Ada")
    sync_api.expect(page.locator("#prompt-audio").get_by_label("Clear")).to_be_visible()
    sync_api.expect(page.locator("#delete-voice")).to_be_visible()


def test_the_menu_of_tasks_closed_without_a_choice_keeps_the_sub_task(
    app: RunningApp, new_page: Callable[..., Page]
) -> None:
    page = opened(new_page(), app)
    text(page, "task").click()
    page.get_by_role("option", name="emotion").click()
    text(page, "sub-task").click()
    page.get_by_role("option", name="sad").click()
    sync_api.expect(page.locator("#task-line")).to_contain_text("sad")
    text(page, "task").click()
    with page.expect_response(is_answer):
        text(page, "target-text").focus()
    page.wait_for_timeout(300)  # in which nothing changes
    sync_api.expect(text(page, "sub-task")).to_have_value("sad")


def test_visitors_from_elsewhere_choose_but_do_not_store(app: RunningApp, new_page: Callable[..., Page]) -> None:
    page = new_page(extra_http_headers={"X-Forwarded-For": "203.0.113.9"})
    opened(page, app)
    choose(page, "lower")
    sync_api.expect(text(page, "prompt-text")).to_have_value(VOICES["low"].says)
    save(page, "Ada")
    sync_api.expect(page.locator("#about-voice-name [role=alert]")).to_contain_text("allowed only from this machine")
    expect_options(page, *SAMPLES["en-US"])


def screenshot(page: Page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)
