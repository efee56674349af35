"""What people have filled in survives a page that is loaded anew; what is gone with the server is taken away."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from app_process import ForkedApp, RunningApp
from recordings import write_tone

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import APIResponse, Locator, Page, Route

ARGUMENTS = ("--enable-gpu-management", "--simulate-gpu", "48GB")
OFTEN = "import residency.web.ui.page_sessions; residency.web.ui.page_sessions.HEARTBEAT_EVERY_S = 0.5\n"
SELDOM = "import residency.web.ui.page_sessions; residency.web.ui.page_sessions.HEARTBEAT_EVERY_S = 3600\n"
GONE = {
    "en-US": "⚠️ Earlier recordings and results are no longer on the server: upload the recording again; your texts are "
    "still here.",
    "zh-CN": "⚠️ 服务器上已没有此前的录音和结果：请重新上传录音，填写的文字仍在。",
}


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, gates: Path) -> Iterator[RunningApp]:
    with ForkedApp(tmp_path_factory.mktemp("recordings"), *ARGUMENTS, prelude=ALL_TASKS + OFTEN, gates=gates) as app:
        yield app


#: The engine of the gates says that it does what the real one does.
ALL_TASKS = """
import sys
sys.path.insert(0, "tests/support")
import gated_engine
from residency.web.speech.task_names import STEP_AUDIO_EDIT_TYPES
gated_engine.supported_edit_types = lambda: STEP_AUDIO_EDIT_TYPES
"""


def test_texts_recording_and_task_survive_a_reload(
    app: RunningApp, new_page: Callable[..., Page], tmp_path: Path
) -> None:
    page = new_page()
    page.goto(app.url)
    fill(page, tmp_path)
    choose(page, "task", "speed")
    choose(page, "sub-task", "more slower")
    for _ in range(2):
        page.reload()
        expect_texts(page, "said\nin two lines", "to say")
        sync_api.expect(recording(page)).to_be_attached()
        sync_api.expect(page.locator("#task input")).to_have_value("speed")
        sync_api.expect(page.locator("#sub-task input")).to_have_value("much slower (more slower)")
        sync_api.expect(page.locator("#task-line")).to_have_text("Says the same at another speed: much slower.")
    page.locator("#sub-task input").click()
    sync_api.expect(page.get_by_role("option")).to_have_count(4)
    page.keyboard.press("Escape")
    press(page, "EDIT")  # of the recording that came back
    expect_results(page, 1)
    sync_api.expect(page.locator("#history")).to_contain_text("Task: speed · much slower (more slower)")
    page.reload()
    expect_results(page, 1)
    expect_texts(page, "said\nin two lines", "to say")
    assert "Traceback" not in app.log


def test_what_was_taken_away_before_a_reload_does_not_come_back(
    app: RunningApp, new_page: Callable[..., Page], tmp_path: Path
) -> None:
    page = new_page()
    page.goto(app.url)
    fill(page, tmp_path)
    page.reload()
    sync_api.expect(recording(page)).to_be_attached()
    expect_texts(page, "said\nin two lines", "to say")
    page.locator("#prompt-audio").get_by_label("Clear").click()
    text(page, "target-text").fill("")
    page.wait_for_function("!/prompt.wav|to say/.test(sessionStorage.getItem('inputs'))")
    page.reload()
    expect_texts(page, "said\nin two lines", "")
    sync_api.expect(recording(page)).to_have_count(0)


def test_a_page_that_is_opened_beside_another_is_empty(
    app: RunningApp, new_page: Callable[..., Page], tmp_path: Path
) -> None:
    page = new_page()
    page.goto(app.url)
    fill(page, tmp_path)
    with page.expect_popup() as opened:
        page.evaluate("window.open(location.href)")  # with a copy of what the tab keeps
    copy = opened.value
    sync_api.expect(copy.locator("#gpu-status [data-model=tts]")).to_be_visible()
    copy.wait_for_function("window.keepsInputs")
    expect_texts(copy, "", "")
    page.reload()
    expect_texts(page, "said\nin two lines", "to say")


def test_no_session_gets_the_recording_of_another(
    app: RunningApp, new_page: Callable[..., Page], tmp_path: Path
) -> None:
    page, thief = new_page(), new_page()
    page.goto(app.url)
    fill(page, tmp_path)
    thief.goto(app.url)
    thief.wait_for_function("window.keepsInputs")
    page.wait_for_function("folder => sessionStorage.getItem('inputs')?.includes(folder)", arg=str(app.tmp_dir))
    kept = page.evaluate("sessionStorage.getItem('inputs')")
    thief.evaluate("kept => sessionStorage.setItem('inputs', kept)", kept)
    thief.reload()
    expect_texts(thief, "said\nin two lines", "to say")
    sync_api.expect(recording(thief)).to_have_count(0)


def test_what_is_kept_may_be_damaged(app: RunningApp, new_page: Callable[..., Page]) -> None:
    page = new_page()
    page.goto(app.url)
    for kept in ("{}", '{"task": 7, "recording": ["x"], "subTask": {}}', '{"recording": "\\u0000"}'):
        page.wait_for_function("window.keepsInputs")
        page.evaluate("kept => sessionStorage.setItem('inputs', kept)", kept)
        page.reload()
        page.wait_for_function("window.keepsInputs")
        sync_api.expect(page.locator("#task input")).to_have_value("clone")
        assert page.locator(".toast-body").count() == 0, kept
        assert "Traceback" not in app.log, kept


def test_an_open_page_outlives_a_restart_of_the_server(
    new_page: Callable[..., Page], tmp_path: Path, gates: Path
) -> None:
    with ForkedApp(tmp_path / "first", *ARGUMENTS, gates=gates, prelude=OFTEN) as first:
        page, empty = new_page(locale="zh-CN"), new_page()
        page.goto(first.url)
        empty.goto(first.url)
        fill(page, tmp_path)
        press(page, "CLONE")
        expect_results(page, 1)
        assert first.stop() == 0
    with ForkedApp(tmp_path / "second", *ARGUMENTS, gates=gates, prelude=OFTEN, port=first.port) as second:
        sync_api.expect(page.locator("#message")).to_have_text(GONE["zh-CN"])
        expect_results(page, 0)
        sync_api.expect(recording(page)).to_have_count(0)
        expect_texts(page, "said\nin two lines", "to say")
        upload(page, tmp_path)
        press(page, "CLONE")
        expect_results(page, 1)
        sync_api.expect(page.locator("#message")).to_have_text("")
        assert empty.locator("#message").inner_text().strip() == "", "it had nothing to lose"
        assert "Traceback" not in second.log


@pytest.mark.parametrize(
    ("locale", "said"), [("en-US", "The recording is no longer on the server"), ("zh-CN", "服务器上已没有该录音")]
)
def test_a_recording_that_is_lost_by_a_restart_is_missed_where_it_was(
    new_page: Callable[..., Page], tmp_path: Path, gates: Path, locale: str, said: str
) -> None:
    with ForkedApp(tmp_path / "first", *ARGUMENTS, gates=gates, prelude=SELDOM) as first:
        page = new_page(locale=locale)
        page.goto(first.url)
        page.wait_for_function("window.keepsInputs")
        sync_api.expect(page.locator("#about-prompt-audio [role=alert]")).to_have_count(0)
        fill(page, tmp_path)
        page.wait_for_function("sessionStorage.getItem('inputs')?.includes('prompt.wav')")
        assert first.stop() == 0
    with ForkedApp(tmp_path / "second", *ARGUMENTS, gates=gates, prelude=SELDOM, port=first.port):
        page.reload()
        alert = page.locator("#about-prompt-audio [role=alert]")
        sync_api.expect(alert).to_contain_text(said)
        expect_texts(page, "said\nin two lines", "to say")
        upload(page, tmp_path)
        sync_api.expect(alert).to_have_count(0)


def test_an_open_page_asks_for_the_password_again_after_a_restart(
    new_page: Callable[..., Page], tmp_path: Path, gates: Path
) -> None:
    """A server that was started again knows no login, and what the page still shows is gone."""
    arguments = (*ARGUMENTS, "--auth", "me:secret")
    with ForkedApp(tmp_path / "first", *arguments, gates=gates, prelude=OFTEN) as first:
        page = new_page()
        page.goto(first.url)
        page.get_by_label("username").fill("me")
        page.locator("input[type=password]").fill("secret")
        page.get_by_role("button", name="Login").click()
        fill(page, tmp_path)
        assert first.stop() == 0
    with ForkedApp(tmp_path / "second", *arguments, gates=gates, prelude=OFTEN, port=first.port):
        sync_api.expect(page.get_by_label("username")).to_be_visible()
        sync_api.expect(recording(page)).to_have_count(0)


@pytest.mark.parametrize("name", ["CLONE", "EDIT"])
def test_a_press_on_a_page_from_before_a_restart_says_what_to_do(
    new_page: Callable[..., Page], tmp_path: Path, gates: Path, name: str
) -> None:
    with ForkedApp(tmp_path / "first", *ARGUMENTS, gates=gates, prelude=SELDOM) as first:
        page = new_page()
        page.goto(first.url)
        fill(page, tmp_path)
        press(page, "CLONE")
        expect_results(page, 1)
        assert first.stop() == 0
    with ForkedApp(tmp_path / "second", *ARGUMENTS, gates=gates, prelude=SELDOM, port=first.port) as second:
        press(page, name)
        sync_api.expect(page.locator("#message")).to_have_text(GONE["en-US"])
        said = page.locator("body").inner_text()
        assert not re.search("[\u4e00-\u9fff]", said)
        assert str(tmp_path) not in said
        expect_texts(page, "said\nin two lines", "to say")
        assert "Traceback" not in second.log


def test_nothing_is_lost_by_a_reload_before_the_server_has_answered_the_last_one(
    new_page: Callable[..., Page], tmp_path: Path, gates: Path
) -> None:
    with ForkedApp(tmp_path / "recordings", *ARGUMENTS, gates=gates, prelude=SELDOM) as app:
        page = new_page()
        page.goto(app.url)
        fill(page, tmp_path)
        press(page, "CLONE")
        expect_results(page, 1)
        answered: list[str] = []

        def keep_the_answer(route: Route) -> None:
            with suppress(sync_api.Error):  # of a page that is gone
                route.fetch()
                answered.append(route.request.url)

        page.route(re.compile("/gradio_api/(run|api|queue/join)"), keep_the_answer)
        for _ in range(2):
            answered.clear()
            with page.expect_request(re.compile("/gradio_api/(run|api|queue/join)")):
                page.reload()
            while not answered:
                page.wait_for_timeout(10)
        text(page, "target-text").fill("to say later")
        page.unroute_all(behavior="ignoreErrors")
        page.reload()
        expect_results(page, 1)
        expect_texts(page, "said\nin two lines", "to say later")
        sync_api.expect(recording(page)).to_be_attached()


def test_a_text_that_is_emptied_before_the_page_is_complete_stays_empty(
    app: RunningApp, new_page: Callable[..., Page]
) -> None:
    page = new_page()
    held: list[Route] = []
    answers = False
    page.route(
        re.compile("/gradio_api/(run|api|queue/join)"),
        lambda route: route.continue_() if answers else held.append(route),
    )
    page.goto(app.url)
    text(page, "prompt-text").fill("said")
    page.wait_for_function("window.inputs?.prompt === 'said'")
    text(page, "prompt-text").fill("")
    page.wait_for_function("window.inputs?.prompt === ''")
    assert not page.evaluate("window.keepsInputs"), "the page is not complete"
    answers = True
    for route in held:
        route.continue_()
    page.wait_for_function("window.textsBack === null")  # after the stored texts were written
    expect_texts(page, "", "")


def test_an_error_that_is_shown_before_the_page_is_complete_stays(
    app: RunningApp, new_page: Callable[..., Page]
) -> None:
    page = new_page()
    held: list[tuple[Route, APIResponse]] = []
    answers = False
    page.route(
        re.compile("/gradio_api/(run|api)"),
        lambda route: route.continue_() if answers else held.append((route, route.fetch())),
    )
    page.goto(app.url)
    press(page, "EDIT")
    error = page.locator(".said [role=alert]")
    sync_api.expect(error).to_be_visible()
    assert held, "the page is complete"
    answers = True
    for route, response in held:
        route.fulfill(response=response)
    page.wait_for_function("window.textsBack === null")  # after the stored texts were written
    sync_api.expect(error).to_be_visible()


def fill(page: Page, folder: Path) -> None:
    text(page, "prompt-text").fill("said\nin two lines")
    upload(page, folder)
    text(page, "target-text").fill("to say")
    page.wait_for_function("/prompt.wav.*to say|to say.*prompt.wav/.test(sessionStorage.getItem('inputs'))")


def upload(page: Page, folder: Path) -> None:
    page.locator("#prompt-audio input[type=file]").set_input_files(write_tone(folder / "prompt.wav"))
    sync_api.expect(recording(page)).to_be_attached()


def recording(page: Page) -> Locator:
    return page.locator("#prompt-audio audio, #prompt-audio .waveform-container").first


def text(page: Page, element: str) -> Locator:
    return page.locator(f"#{element}").locator("input, textarea")


def expect_texts(page: Page, prompt: str, target: str) -> None:
    sync_api.expect(text(page, "prompt-text")).to_have_value(prompt)
    sync_api.expect(text(page, "target-text")).to_have_value(target)


def choose(page: Page, element: str, value: str) -> None:
    page.locator(f"#{element} input").click()
    page.get_by_role("option", name=re.compile(rf"(^|\(){value}\)?$")).click()


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def expect_results(page: Page, count: int) -> None:
    links = "#history .message-buttons-left a[download], #history .bot-row a[download]"
    sync_api.expect(page.locator(links)).to_have_count(count)
