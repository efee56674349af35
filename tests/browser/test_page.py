"""The whole story in a real browser: hear a cloned voice, edit it twice, and watch the GPU panel tell the truth."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
from app_process import ForkedApp

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

SENTENCE = "The quick brown fox jumps over the lazy dog, and then it sleeps in the warm afternoon sun."
STORY = " ".join([SENTENCE] * 2)

# Writes down every state that the panel shows, so that none is missed between two looks of the test.
_WATCH = """
window.shown = [];
new MutationObserver(() => {
  const state = document.querySelector('#gpu-status [data-model=tts]')?.dataset.state;
  if (state && state !== window.shown.at(-1)) window.shown.push(state);
}).observe(document, {subtree: true, childList: true, attributes: true, characterData: true});
"""


@pytest.fixture
def page(tmp_path: Path, new_page: Callable[..., Page]) -> Iterator[Page]:
    arguments = ("--enable-gpu-management", "--simulate-gpu", "48GB")
    with ForkedApp(tmp_path, *arguments) as app:
        page = new_page()
        page.add_init_script(_WATCH)
        strangers: list[str] = []
        page.on("request", lambda request: strangers.append(request.url) if _abroad(request.url, app.url) else None)
        page.goto(app.url)
        page_source = page.content()
        yield page
        page.close()
        assert not strangers, "the page asks the internet for something"
        assert "https://fonts" not in page_source, "it prepares to"
        assert app.stop() == 0


def test_clone_edit_twice_release_and_clone_again(page: Page, recording: str, tmp_path: Path) -> None:
    sync_api.expect(page.locator("#gpu-status")).to_contain_text("Simulated GPU")
    expect_state(page, "released")

    fill(page, recording, prompt="Good morning, this is a short recording of my voice.", target=STORY)
    press(page, "CLONE")
    expect_outputs(page, 1)
    expect_state(page, "cpu")
    assert_in_order(["released", "gpu", "cpu"], page.evaluate("shown"))
    cloned_s = spoken_s(page, 0, tmp_path)
    # People speak 10 to 25 characters a second.
    assert len(STORY) / 25 < cloned_s < len(STORY) / 10

    choose(page, "task", "speed")
    choose(page, "sub-task", "faster")
    press(page, "EDIT")
    expect_outputs(page, 2)
    choose(page, "task", "denoise")
    press(page, "EDIT")
    expect_outputs(page, 3)
    expect_state(page, "cpu")
    assert spoken_s(page, 1, tmp_path) < cloned_s
    assert 0 < spoken_s(page, 2, tmp_path) < cloned_s

    page.get_by_role("button", name="Release").click()
    expect_state(page, "released")
    sync_api.expect(page.locator("#gpu-message")).to_contain_text("the next request loads it again")

    choose(page, "task", "clone")
    page.get_by_label("Target Text").fill(SENTENCE)
    press(page, "CLONE")
    expect_outputs(page, 1)
    expect_state(page, "cpu")
    assert len(SENTENCE) / 25 < spoken_s(page, 0, tmp_path) < len(SENTENCE) / 10


def test_bad_input_is_said_and_nothing_is_lost(page: Page, recording: str, tmp_path: Path) -> None:
    fill(page, recording, prompt="Good morning.", target=SENTENCE)
    press(page, "CLONE")
    expect_outputs(page, 1)
    sync_api.expect(page.locator(".said [role=alert]")).to_have_count(0)

    page.get_by_label("Target Text").fill("")
    press(page, "CLONE")
    sync_api.expect(page.locator("#about-target-text")).to_contain_text("Target Text is empty")
    expect_outputs(page, 1)

    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"this is no audio")
    page.locator("#prompt-audio").get_by_label("Clear").click()
    fill(page, str(broken), prompt="Good morning.", target=SENTENCE)
    press(page, "CLONE")
    sync_api.expect(page.locator("#about-target-text")).to_be_hidden()
    sync_api.expect(page.locator("#about-prompt-audio")).to_contain_text("⚠️")
    expect_outputs(page, 1)

    # The history is what EDIT works on, so it goes on as if nothing had been.
    choose(page, "task", "speed")
    sync_api.expect(page.locator("#sub-task input")).to_have_value("faster")
    press(page, "EDIT")
    expect_outputs(page, 2)
    expect_state(page, "cpu")
    sync_api.expect(page.locator(".said [role=alert]")).to_have_count(0)

    page.get_by_role("button", name="Clear History").click()
    expect_outputs(page, 0)


def fill(page: Page, recording: str, *, prompt: str, target: str) -> None:
    page.get_by_label("Prompt Text").fill(prompt)
    page.locator("#prompt-audio input[type=file]").set_input_files(recording)
    sync_api.expect(page.locator("#prompt-audio").get_by_label("Clear")).to_be_visible()
    page.get_by_label("Target Text").fill(target)


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def choose(page: Page, element: str, option: str) -> None:
    page.locator(f"#{element} input").click()
    page.get_by_role("option", name=re.compile(rf"(^|\(){option}\)?$")).click()


def outputs(page: Page) -> list[str]:
    """The addresses of the results in the chat: each has a player and a link to download it."""
    # Where the buttons are beside the message, and where they are in it.
    links = "#history .message-buttons-left a[download], #history .bot-row a[download]"
    return page.locator(links).evaluate_all("links => links.map(link => link.href)")


def players(page: Page) -> Locator:
    """Those of the results, of Gradio 6 and of Gradio 5."""
    return page.locator("#history .bot-row").locator(".waveform-wrapper, .waveform-container")


def expect_outputs(page: Page, count: int) -> None:
    sync_api.expect(players(page)).to_have_count(count)


def expect_state(page: Page, state: str) -> None:
    chip = page.locator("#gpu-status [data-model=tts]")
    sync_api.expect(chip).to_have_attribute("data-state", state)


def spoken_s(page: Page, index: int, folder: Path) -> float:
    """Seconds of the result with this index, downloaded as the browser would and looked at."""
    path = folder / "downloaded.wav"
    path.write_bytes(page.request.get(outputs(page)[index]).body())
    audio, sample_rate = soundfile.read(path)
    path.unlink()
    # What the player plays is what the link downloads.
    times = page.locator("#history .bot-row").get_by_text(re.compile(r"^\d+:\d\d$"))
    each = times.count() // players(page).count()  # where it is, and how long it is; or the latter alone
    shown = times.nth(index * each + each - 1)
    sync_api.expect(shown).to_have_text(re.compile("[1-9]"))
    minutes, seconds = shown.inner_text().split(":")
    assert int(minutes) * 60 + int(seconds) == pytest.approx(len(audio) / sample_rate, abs=1)
    assert np.isfinite(audio).all()
    assert np.sqrt(np.mean(audio**2)) > 0.005
    return len(audio) / sample_rate


def assert_in_order(wanted: list[str], shown: list[str]) -> None:
    """All wanted states were shown, in this order; ``moving`` between them is not always seen."""
    assert [state for state in shown if state != "moving"] == wanted


def _abroad(url: str, home: str) -> bool:
    return not url.startswith((home, "data:", "blob:"))
