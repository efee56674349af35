"""What a session leaves behind, and what signing in allows."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
from serving import RunningApp, wait_until

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Page

ARGUMENTS = ("--enable-gpu-management", "--simulate-gpu", "48GB")
NO_GRACE = "import residency.web.presence; residency.web.presence.LEFT_FOR_S = 0\n"


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    (tmp_path / "gates").mkdir()
    return tmp_path / "gates"


def test_recordings_go_when_their_page_is_closed(new_page: Callable[..., Page], tmp_path: Path, gates: Path) -> None:
    folder = tmp_path / "recordings"

    def recordings() -> set[str]:
        # Not rglob: it raises where a folder goes while it looks.
        return {name for _, _, names in os.walk(folder) for name in names if name.endswith(".wav")}

    with RunningApp(folder, *ARGUMENTS, gates=gates, prelude=NO_GRACE) as app:
        page, other = new_page(), new_page()
        for each, name in ((page, "mine"), (other, "theirs")):
            each.goto(app.url)
            each.get_by_label("Prompt Text").fill("said")
            upload(each, tmp_path, f"{name}.wav")
        page.get_by_label("Target Text").fill("to say")
        page.get_by_role("button", name="CLONE", exact=True).click()
        sync_api.expect(page.locator("#history .bot-row")).not_to_have_count(0)
        assert {"mine.wav", "theirs.wav"} < recordings()
        page.context.close()
        assert wait_until(lambda: recordings() == {"theirs.wav"}), recordings()
        assert app.stop() == 0
    assert not list(folder.iterdir())


def test_who_has_signed_in_may_press(new_page: Callable[..., Page], tmp_path: Path, gates: Path) -> None:
    with RunningApp(tmp_path / "recordings", *ARGUMENTS, "--auth", "me:secret", gates=gates) as app:
        page = new_page()
        page.goto(app.url.replace("127.0.0.1", "elsewhere.localhost"))
        sign_in(page, "me", "wrong")
        sync_api.expect(page.locator("body")).to_contain_text("Incorrect")
        assert page.locator("#gpu-panel").count() == 0
        sign_in(page, "me", "secret")
        page.locator("#gpu-warm").click()
        chip = page.locator("#gpu-status [data-model=tts]")
        sync_api.expect(chip).to_have_attribute("data-state", "gpu")
        sync_api.expect(page.locator("#gpu-message")).to_contain_text("On its way")


def sign_in(page: Page, user: str, password: str) -> None:
    page.get_by_label("username").fill(user)
    page.get_by_label("password").fill(password)
    page.get_by_role("button", name="Login").click()


def upload(page: Page, folder: Path, name: str) -> None:
    # Files of one content lie on the disk once.
    soundfile.write(folder / name, np.sin(np.arange(16000) * 0.01 * len(name)), 16000)
    page.locator("#prompt-audio input[type=file]").set_input_files(str(folder / name))
    sync_api.expect(page.locator("#prompt-audio").get_by_label("Clear")).to_be_visible()
