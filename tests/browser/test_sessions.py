"""What a session leaves behind, and what signing in allows."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
from app_process import ForkedApp, wait_until
from gated_engine import close_gate, open_gate
from tcp_relay import Network

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Page

ARGUMENTS = ("--enable-gpu-management", "--simulate-gpu", "48GB")
OFTEN = "import residency.web.ui.page_sessions; residency.web.ui.page_sessions.HEARTBEAT_EVERY_S = 0.5\n"
NO_GRACE = "import residency.web.server.heartbeats; residency.web.server.heartbeats.LEFT_FOR_S = 0\n"


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    (tmp_path / "gates").mkdir()
    return tmp_path / "gates"


def test_recordings_go_when_their_page_is_closed(new_page: Callable[..., Page], tmp_path: Path, gates: Path) -> None:
    folder = tmp_path / "recordings"
    with ForkedApp(folder, *ARGUMENTS, gates=gates, prelude=NO_GRACE) as app:
        page, other = new_page(), new_page()
        for each, name in ((page, "mine"), (other, "theirs")):
            each.goto(app.url)
            each.get_by_label("Prompt Text").fill("said")
            upload(each, tmp_path, f"{name}.wav")
        page.get_by_label("Target Text").fill("to say")
        page.get_by_role("button", name="CLONE", exact=True).click()
        sync_api.expect(page.locator("#history .bot-row")).not_to_have_count(0)
        assert {"mine.wav", "theirs.wav"} < recordings(folder)
        page.context.close()
        assert wait_until(lambda: recordings(folder) == {"theirs.wav"}), recordings(folder)
        assert app.stop() == 0
    assert not list(folder.iterdir())


@pytest.mark.parametrize("arguments", [ARGUMENTS, ()], ids=["managed", "unmanaged"])
def test_a_network_that_was_cut_for_a_while_takes_nothing_away(
    new_page: Callable[..., Page], tmp_path: Path, gates: Path, arguments: tuple[str, ...]
) -> None:
    folder = tmp_path / "recordings"
    prelude = OFTEN + "import residency.web.server.heartbeats; residency.web.server.heartbeats.LEFT_FOR_S = 5\n"
    with ForkedApp(folder, *arguments, gates=gates, prelude=prelude) as app, Network(app.port) as network:
        page = new_page()
        # Gradio tells in a corner that the connection was lost, until somebody closes that.
        page.add_locator_handler(page.locator(".toast-close").first, lambda close: close.click())
        page.goto(network.url)
        clone(page, tmp_path, "mine.wav")
        with page.expect_event("requestfailed", lambda request: "/here/" in request.url):
            network.cut()
        with page.expect_response(lambda answer: "/here/" in answer.url):
            network.mend()

        # Whoever is away for as long as others were since the cut has ended, and so would they have.
        mine = recordings(folder)
        other = new_page()
        other.goto(app.url)
        clone(other, tmp_path, "theirs.wav")
        other.context.close()
        assert wait_until(lambda: recordings(folder) == mine), recordings(folder)

        for _ in range(2):  # a page that has lost its line may be loading itself anew just when it is pressed
            choose_task(page, "vad")
            page.get_by_role("button", name="EDIT", exact=True).click()
            with suppress(AssertionError):
                expect_results(page, 2, within_ms=40_000)
                break
        expect_results(page, 2)
        page.locator("#prompt-audio").get_by_label("Clear").click()
        upload(page, tmp_path, "another.wav")
        choose_task(page, "clone")
        page.get_by_role("button", name="CLONE", exact=True).click()
        expect_results(page, 1)
        assert page.locator("#message").inner_text().strip() == ""


def test_a_request_that_was_cancelled_while_its_page_was_away_is_told(
    new_page: Callable[..., Page], tmp_path: Path, gates: Path
) -> None:
    prelude = OFTEN + "import residency.web.server.middleware; residency.web.server.middleware._LINE_CUT_S = 0.1\n"
    with (
        ForkedApp(tmp_path / "recordings", *ARGUMENTS, gates=gates, prelude=prelude) as app,
        Network(app.port) as network,
    ):
        close_gate(gates, "speak")
        first, page = new_page(), new_page()
        first.goto(app.url)
        ask(first, tmp_path, "first.wav")
        app.wait_for_line("at the gate: speak")
        page.goto(network.url)
        ask(page, tmp_path, "mine.wav")
        sync_api.expect(page.locator("#progress")).to_contain_text("you are next")
        network.cut()
        assert wait_until(lambda: app.model()["waiting"] == 0)
        network.mend()
        sync_api.expect(page.locator("#message [role=alert]")).to_contain_text("Submit it again")
        open_gate(gates, "speak")
        expect_results(first, 1)


def test_who_has_signed_in_may_press(new_page: Callable[..., Page], tmp_path: Path, gates: Path) -> None:
    with ForkedApp(tmp_path / "recordings", *ARGUMENTS, "--auth", "me:secret", gates=gates) as app:
        page = new_page()
        page.goto(app.url.replace("127.0.0.1", "elsewhere.localhost"))
        sign_in(page, "me", "wrong")
        sync_api.expect(page.locator("body")).to_contain_text("Incorrect")
        assert page.locator("#gpu-panel").count() == 0
        sign_in(page, "me", "secret")
        page.locator("#gpu-warm").click()
        chip = page.locator("#gpu-status [data-model=tts]")
        sync_api.expect(chip).to_have_attribute("data-state", "gpu")
        sync_api.expect(page.locator("#gpu-message")).to_contain_text("is on the simulated GPU now")


@pytest.mark.parametrize(
    ("locale", "said"),
    [("en-US", "⚠️ Too many wrong passwords from here: wait"), ("zh-CN", "⚠️ 密码错误次数过多：请等待")],
)
def test_the_form_for_the_password_says_that_it_was_tried_too_often(
    new_page: Callable[..., Page], tmp_path: Path, locale: str, said: str
) -> None:
    never_right = "from residency.web.server import logins; logins.FAILURES = 1\n"
    with ForkedApp(tmp_path, "--auth", "me:secret", gates=tmp_path, prelude=never_right) as app:
        page = new_page(locale=locale)
        page.goto(app.url)
        for _ in range(2):
            page.locator("label textarea, label input").first.fill("me")
            page.locator("input[type=password]").fill("guess")
            with page.expect_response("**/login"):
                page.locator("input[type=password]").press("Enter")
        sync_api.expect(page.get_by_role("alert")).to_contain_text(said)
        sync_api.expect(page.locator(".creds")).to_be_hidden()


def sign_in(page: Page, user: str, password: str) -> None:
    page.get_by_label("username").fill(user)
    page.get_by_label("password").fill(password)
    page.get_by_role("button", name="Login").click()


def recordings(folder: Path) -> set[str]:
    # Not rglob: it raises where a folder goes while it looks.
    return {name for _, _, names in os.walk(folder) for name in names if name.endswith(".wav")}


def clone(page: Page, folder: Path, name: str) -> None:
    ask(page, folder, name)
    sync_api.expect(page.locator("#history .bot-row")).not_to_have_count(0)


def ask(page: Page, folder: Path, name: str) -> None:
    page.get_by_label("Prompt Text").fill("said")
    upload(page, folder, name)
    page.get_by_label("Target Text").fill("to say")
    page.get_by_role("button", name="CLONE", exact=True).click()


def expect_results(page: Page, count: int, within_ms: float | None = None) -> None:
    links = "#history .message-buttons-left a[download], #history .bot-row a[download]"
    sync_api.expect(page.locator(links)).to_have_count(count, timeout=within_ms)


def choose_task(page: Page, task: str) -> None:
    page.locator("#task input").click()
    page.get_by_role("option", name=re.compile(rf"(^|\(){task}\)?$")).click()


def upload(page: Page, folder: Path, name: str) -> None:
    # Files of one content lie on the disk once.
    soundfile.write(folder / name, np.sin(np.arange(16000) * 0.01 * len(name)), 16000)
    page.locator("#prompt-audio input[type=file]").set_input_files(str(folder / name))
    sync_api.expect(page.locator("#prompt-audio").get_by_label("Clear")).to_be_visible()
