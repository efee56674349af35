"""The history of a session: requests that overtake each other, and what is shown of them."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from app_process import ForkedApp, RunningApp
from gated_engine import close_gate, open_gate
from recordings import write_tone

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Page

LINKS = "#history .message-buttons-left a[download], #history .bot-row a[download]"


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, gates: Path) -> Iterator[RunningApp]:
    arguments = ("--enable-gpu-management", "--simulate-gpu", "48GB", "--gpu-keep-warm", "-1")
    with ForkedApp(tmp_path_factory.mktemp("recordings"), *arguments, gates=gates) as app:
        yield app


@pytest.fixture
def page(app: RunningApp, new_page: Callable[..., Page]) -> Page:
    app.forget_log()
    page = new_page()
    page.goto(app.url)
    return page


@pytest.fixture
def released(page: Page, app: RunningApp, gates: Path, tmp_path: Path) -> Page:
    """A page with one result, whose next request waits at the gate ``load``."""
    clone(page, tmp_path, "old")
    sync_api.expect(page.locator("#history .bot-row")).to_contain_text(["old"])
    assert app.post("/gpu/release", {})[0] == 200
    close_gate(gates, "load")
    return page


def test_what_is_cleared_during_an_edit_stays_cleared(
    released: Page, app: RunningApp, gates: Path, tmp_path: Path
) -> None:
    page = released
    edit(page)
    app.wait_for_line("at the gate: load")
    page.get_by_role("button", name="Clear History").click()
    sync_api.expect(page.locator("#history .bot-row")).to_have_count(0)
    open_gate(gates, "load")
    sync_api.expect(page.locator("#message")).to_contain_text("cleared or replaced")
    sync_api.expect(page.locator("#history .bot-row")).to_have_count(0)
    assert str(app.tmp_dir) not in page.locator("#message").inner_text()
    press(page, "EDIT")
    expect_results(page, 1)
    sync_api.expect(page.locator("#message")).to_have_text("")


def test_a_clone_is_not_lost_to_an_edit_that_is_asked_for_meanwhile(
    released: Page, app: RunningApp, gates: Path
) -> None:
    page = released
    page.get_by_label("Target Text").fill("new")
    press(page, "CLONE")
    app.wait_for_line("at the gate: load")
    edit(page)
    sync_api.expect(page.locator("#message")).to_contain_text("this one was not sent")
    open_gate(gates, "load")
    sync_api.expect(page.locator("#history .bot-row")).to_contain_text(["new"])
    sync_api.expect(page.locator("#history .bot-row")).to_contain_text(["new"])
    expect_results(page, 1)
    assert all(page.request.get(link).ok for link in results(page))
    press(page, "EDIT")
    expect_results(page, 2)


def test_one_server_event_draws_a_clone_and_its_players_have_the_new_recording(page: Page, tmp_path: Path) -> None:
    clone(page, tmp_path, "old")
    expect_results(page, 1)
    [old] = results(page)
    events: list[str] = []
    page.on("request", lambda request: events.append(request.url) if "/queue/join" in request.url else None)
    page.locator("#target-text").locator("input, textarea").fill("new")
    with page.expect_request(lambda request: "/clone-" in request.url and request.url != old):  # of the player
        press(page, "CLONE")
    sync_api.expect(page.locator("#history .bot-row")).to_contain_text(["new"])
    expect_results(page, 1)
    assert results(page) != [old]
    press(page, "EDIT")  # answered after the clone's events
    sync_api.expect(page.locator(".said [role=alert]")).to_be_visible()
    assert len(events) == 2, "one for CLONE, one for EDIT"


@pytest.mark.parametrize("name", ["CLONE", "EDIT"])
def test_a_request_begins_without_the_error_of_the_one_before_and_shows_its_progress_once(
    page: Page, app: RunningApp, gates: Path, tmp_path: Path, name: str
) -> None:
    clone(page, tmp_path, "")
    message = sync_api.expect(page.locator("#about-target-text"))
    message.to_contain_text("Target Text is empty")
    if name == "EDIT":
        page.locator("#task input").click()
        page.get_by_role("option", name="cut pauses (vad)", exact=True).click()
    close_gate(gates, "speak")
    page.get_by_label("Target Text").fill("new")
    press(page, name)
    app.wait_for_line("at the gate: speak")
    sync_api.expect(page.locator("#progress progress")).to_be_visible()
    progress = page.wait_for_function(  # it is drawn anew each time that it changes
        """() => {
          const lines = [...document.querySelectorAll(".progress-level-inner, progress")];
          const shown = lines.filter(line => line.checkVisibility()).map(line => line.closest(".block").id);
          return shown.length && shown;
        }"""
    ).json_value()
    error_stays = page.get_by_text("Target Text is empty").is_visible()
    open_gate(gates, "speak")
    expect_results(page, 1)
    message.to_have_text("")
    assert (progress, error_stays) == (["progress"], False)


def test_what_a_failed_request_says_stays_after_it_until_the_next_one(page: Page, tmp_path: Path) -> None:
    clone(page, tmp_path, "")
    message = sync_api.expect(page.locator("#about-target-text"))
    for _ in range(2):
        message.to_contain_text("Target Text is empty")
        page.reload()
    sync_api.expect(page.locator("#prompt-audio").get_by_label("Clear")).to_be_visible()  # it has come back
    sync_api.expect(page.locator("#prompt-text").locator("input, textarea")).to_have_value("said")
    page.locator("#target-text").locator("input, textarea").fill("new")
    press(page, "CLONE")
    expect_results(page, 1)
    message.to_have_text("")


@pytest.mark.parametrize("outcome", ["spoken", "failed"])
def test_a_page_that_is_loaded_anew_during_a_request_hears_its_end(
    page: Page, app: RunningApp, gates: Path, tmp_path: Path, outcome: str
) -> None:
    clone(page, tmp_path, "first")
    expect_results(page, 1)
    assert app.post("/gpu/release", {})[0] == 200
    close_gate(gates, "load")
    edit(page)
    app.wait_for_line("at the gate: load")
    page.reload()
    sync_api.expect(page.locator("#message")).to_contain_text("still running")
    expect_results(page, 1)
    page.reload()
    sync_api.expect(page.locator("#message")).to_contain_text("still running")
    if outcome == "failed":
        (gates / "broken").touch()
    open_gate(gates, "load")
    if outcome == "failed":
        sync_api.expect(page.locator("#message")).to_contain_text("broken")
        (gates / "broken").unlink()
        expect_results(page, 1)
    else:
        expect_results(page, 2)
        sync_api.expect(page.locator("#message")).to_have_text("")
    assert all(page.request.get(link).ok for link in results(page))
    edit(page)
    expect_results(page, 2 if outcome == "failed" else 3)
    assert "Traceback" not in app.log or outcome == "failed"


def test_a_page_that_is_opened_beside_another_begins_at_the_beginning(
    page: Page, app: RunningApp, tmp_path: Path
) -> None:
    clone(page, tmp_path, "mine")
    expect_results(page, 1)
    with page.expect_popup() as opened:
        page.evaluate("window.open(location.href)")  # with a copy of what the page keeps
    copy = opened.value
    clone(copy, tmp_path, "another")
    sync_api.expect(copy.locator("#history .bot-row")).to_contain_text(["another"])
    page.reload()
    sync_api.expect(page.locator("#history .bot-row")).to_contain_text(["mine"])


def test_a_duplicate_begins_at_the_beginning_and_who_comes_back_goes_on(
    page: Page, app: RunningApp, tmp_path: Path
) -> None:
    clone(page, tmp_path, "mine")
    expect_results(page, 1)
    # As of a duplicated tab: a copy of what the tab keeps, and a page that comes by the history.
    with page.expect_popup() as opened:
        page.evaluate("window.open('healthz')")
    copy = opened.value
    copy.wait_for_url("**/healthz")
    assert "visit" in copy.evaluate("Object.keys(sessionStorage)")
    copy.evaluate("history.replaceState(null, '', '/')")
    copy.goto(f"{app.url}/readyz")
    copy.go_back()
    assert copy.evaluate("performance.getEntriesByType('navigation')[0].type") == "back_forward"
    clone(copy, tmp_path, "another")
    sync_api.expect(copy.locator("#history .bot-row")).to_contain_text(["another"])
    expect_results(copy, 1)

    page.bring_to_front()  # what is behind another page is drawn seldom
    edit(page)
    expect_results(page, 2)
    page.goto(f"{app.url}/readyz")
    page.go_back()
    expect_results(page, 2)
    page.reload()
    expect_results(page, 2)
    sync_api.expect(page.locator("#history")).not_to_contain_text("another")
    edit(page)
    expect_results(page, 3)
    copy.reload()
    sync_api.expect(copy.locator("#history .bot-row")).to_contain_text(["another"])


@pytest.mark.parametrize("locale", ["zh-CN", "de-DE"])
def test_there_is_a_button_to_save_a_result_and_none_to_publish_it(
    app: RunningApp, new_page: Callable[..., Page], tmp_path: Path, locale: str
) -> None:
    page = new_page(locale=locale)
    page.goto(app.url)
    clone(page, tmp_path, "to say")
    expect_results(page, 1)
    assert_only_saving_buttons(page)


def assert_only_saving_buttons(page: Page) -> None:
    seen = page.locator("#history .download-link, #history .download-link ~ *").locator("visible=true")
    tags = seen.evaluate_all("each => each.map(element => element.tagName)")
    assert tags == ["A", "A"], "of the prompt and of the result"


def test_texts_are_shown_as_they_are(page: Page, tmp_path: Path) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    text = "<b>bold</b> <img src=nowhere> R&D &lt; 1 < 2"
    clone(page, tmp_path, text)
    sync_api.expect(page.locator("#history .bot-row")).to_contain_text([text])
    expect_results(page, 1)
    assert page.locator("#history b, #history img[src=nowhere]").count() == 0
    assert not [url for url in asked if "nowhere" in url]
    assert_only_saving_buttons(page)


def test_no_other_site_shows_the_page_in_a_frame(app: RunningApp, new_page: Callable[..., Page]) -> None:
    class Prize(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(f"<h1>Win a prize</h1><iframe src='{app.url}'></iframe>".encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Prize) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        page = new_page()
        with page.expect_console_message(lambda message: "frame-ancestors" in message.text):
            page.goto(f"http://localhost:{site.server_port}")
        assert page.frame_locator("iframe").locator("#clone").count() == 0
        site.shutdown()


def clone(page: Page, folder: Path, target: str) -> None:
    page.locator("#prompt-text").locator("input, textarea").fill("said")
    page.locator("#prompt-audio input[type=file]").set_input_files(write_tone(folder / "prompt.wav"))
    sync_api.expect(page.locator("#prompt-audio audio, #prompt-audio .waveform-container").first).to_be_attached()
    page.locator("#target-text").locator("input, textarea").fill(target)
    press(page, "CLONE")


def edit(page: Page) -> None:
    page.locator("#task input").click()
    page.get_by_role("option", name="cut pauses (vad)", exact=True).click()
    press(page, "EDIT")


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def results(page: Page) -> list[str]:
    return page.locator(LINKS).evaluate_all("links => links.map(link => link.href)")


def expect_results(page: Page, count: int) -> None:
    sync_api.expect(page.locator(LINKS)).to_have_count(count)
