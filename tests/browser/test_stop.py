"""Impatient people: presses during a request, Stop, where errors are shown, and the one line of progress."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from app_process import ForkedApp, RunningApp, wait_until
from gated_engine import close_gate, open_gate
from recordings import write_tone

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

ARGUMENTS = {"managed": ("--enable-gpu-management", "--simulate-gpu", "48GB", "--gpu-keep-warm", "-1"), "bare": ()}
#: For what the page does in the same way without a manager.
managed_only = pytest.mark.parametrize("app", ["managed"], indirect=True)
DESKTOP, PHONE = (1280, 800), (390, 844)
LINKS = "#history .message-buttons-left a[download], #history .bot-row a[download]"


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module", params=ARGUMENTS)
def app(request: Any, tmp_path_factory: pytest.TempPathFactory, gates: Path) -> Iterator[RunningApp]:
    with ForkedApp(tmp_path_factory.mktemp("recordings"), *ARGUMENTS[request.param], gates=gates) as app:
        yield app


@pytest.fixture
def page(app: RunningApp, new_page: Callable[..., Page], tmp_path: Path) -> Page:
    app.forget_log()
    return opened(app, new_page, tmp_path)


def opened(app: RunningApp, new_page: Callable[..., Page], folder: Path, **options: Any) -> Page:
    """A page on which everything is filled in for a CLONE."""
    page = new_page(**options)
    page.goto(app.url)
    field(page, "prompt-text").fill("said")
    upload(page, folder)
    field(page, "target-text").fill("first")
    return page


def test_a_second_press_is_refused_at_once_and_nothing_is_computed_for_it(
    page: Page, app: RunningApp, gates: Path
) -> None:
    close_gate(gates, "speak")
    press(page, "clone")
    app.wait_for_line("at the gate: speak")
    for again in ("clone", "edit"):
        field(page, "target-text").fill("second")
        press(page, again)
        sync_api.expect(page.locator("#message [role=alert]")).to_contain_text("press Stop")
        in_view(page.locator("#message"))
    sync_api.expect(page.locator("#progress")).to_contain_text("generating")
    open_gate(gates, "speak")
    expect_results(page, 1)
    sync_api.expect(page.locator("#history .bot-row")).to_contain_text(["first"])
    sync_api.expect(page.locator("#message")).to_be_hidden()
    assert app.log.count("spoken:") == 1
    choose_task(page, "vad")
    press(page, "edit")
    expect_results(page, 2)


def test_a_request_that_waits_leaves_the_queue_when_it_is_stopped(
    page: Page, app: RunningApp, gates: Path, new_page: Callable[..., Page], tmp_path: Path
) -> None:
    other = opened(app, new_page, tmp_path)
    sync_api.expect(page.locator("#stop")).to_be_hidden()
    close_gate(gates, "speak")
    press(other, "clone")
    app.wait_for_line("at the gate: speak")
    field(page, "target-text").fill("mine")
    press(page, "clone")
    sync_api.expect(page.locator("#progress")).to_contain_text("you are next")
    press(page, "stop")
    sync_api.expect(page.locator("#message")).to_contain_text("was stopped")
    sync_api.expect(page.locator("#message [role=alert]")).to_have_count(0)
    sync_api.expect(page.locator("#progress")).to_be_hidden()
    sync_api.expect(page.locator("#stop")).to_be_hidden()
    open_gate(gates, "speak")
    expect_results(other, 1)
    press(page, "clone")
    expect_results(page, 1)
    assert app.log.count("spoken: said mine") == 1


def test_a_request_that_runs_is_stopped_at_the_engines_next_step(page: Page, app: RunningApp, gates: Path) -> None:
    press(page, "clone")
    expect_results(page, 1)
    app.forget_log()
    close_gate(gates, "speak")
    field(page, "target-text").fill("second")
    press(page, "clone")
    app.wait_for_line("at the gate: speak")
    press(page, "stop")
    sync_api.expect(page.locator("#progress")).to_contain_text("Stopping")
    field(page, "target-text").fill("third")
    press(page, "clone")  # whoever has stopped a request need not wait for its end
    sync_api.expect(page.locator("#progress")).to_contain_text("you are next")
    open_gate(gates, "speak")
    sync_api.expect(page.locator("#history .bot-row")).to_contain_text(["third"])
    expect_results(page, 1)
    sync_api.expect(page.locator("#stop")).to_be_hidden()
    assert "second" not in app.log
    assert "Traceback" not in app.log


@managed_only
def test_what_is_waited_for_by_a_page_whose_history_is_cleared_is_not_computed(
    page: Page, app: RunningApp, gates: Path, new_page: Callable[..., Page], tmp_path: Path
) -> None:
    other = opened(app, new_page, tmp_path)
    close_gate(gates, "speak")
    press(other, "clone")
    app.wait_for_line("at the gate: speak")
    field(page, "target-text").fill("mine")
    press(page, "clone")
    sync_api.expect(page.locator("#progress")).to_contain_text("you are next")
    press(page, "clear")
    sync_api.expect(page.locator("#message")).to_contain_text("cleared")
    open_gate(gates, "speak")
    expect_results(other, 1)
    assert "mine" not in app.log


@managed_only
def test_a_page_that_was_loaded_anew_shows_the_progress_and_may_stop_it(
    page: Page, app: RunningApp, gates: Path
) -> None:
    close_gate(gates, "speak")
    press(page, "clone")
    app.wait_for_line("at the gate: speak")
    page.reload()
    sync_api.expect(page.locator("#progress")).to_contain_text("generating")
    press(page, "stop")
    sync_api.expect(page.locator("#progress")).to_contain_text("Stopping")
    open_gate(gates, "speak")
    sync_api.expect(page.locator("#message")).to_contain_text("was stopped")
    sync_api.expect(page.locator("#stop")).to_be_hidden()
    field(page, "target-text").fill("again")
    press(page, "clone")  # is not taken for a second one
    expect_results(page, 1)


@managed_only
@pytest.mark.parametrize(("locale", "size"), [("zh-CN", DESKTOP), ("en-US", PHONE)])  # English is the longer one
def test_an_error_is_shown_in_view_at_its_control_until_the_next_press(
    app: RunningApp, new_page: Callable[..., Page], tmp_path: Path, locale: str, size: tuple[int, int]
) -> None:
    page = opened(app, new_page, tmp_path, locale=locale, viewport={"width": size[0], "height": size[1]})
    english = locale == "en-US"
    mistakes: list[tuple[str, str, str, str]] = [
        ("prompt-text", "clone", "Prompt Text is empty", "提示文本为空"),
        ("target-text", "clone", "Target Text is empty", "目标文本为空"),
        ("task", "edit", "EDIT needs a task", "EDIT 需要编辑任务"),
        ("prompt-audio", "clone", "the page has sample voices below it", "其下方有示例声音可用"),
    ]
    for control, button, en, zh in mistakes:
        before = None
        if control.endswith("text"):
            before = field(page, control).input_value()
            field(page, control).fill("")
        elif control == "prompt-audio":
            page.locator("#prompt-audio").get_by_label(re.compile("Clear|清除")).click()
        press(page, button)
        shown = page.locator(".said [role=alert]")
        sync_api.expect(shown).to_have_count(1)
        sync_api.expect(shown).to_contain_text(en if english else zh)
        assert (zh if english else en) not in shown.inner_text()
        place = page.locator(f"#about-{control}")
        sync_api.expect(place.locator("[role=alert]")).to_have_count(1)
        in_view(place)
        beside(place, page.locator(f"#{control}"))
        if control != "prompt-audio":
            described = page.locator(f"#{control} :is(textarea, input)").first
            sync_api.expect(described).to_have_attribute("aria-describedby", f"about-{control}")
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=f"{folder}/error-{control}-{size[0]}-{locale}.png")
        if before:
            field(page, control).fill(before)
    upload(page, tmp_path)
    press(page, "clone")
    expect_results(page, 1)
    sync_api.expect(page.locator(".said [role=alert]")).to_have_count(0)
    sync_api.expect(page.locator("#prompt-text :is(textarea, input)").first).not_to_have_attribute("aria-invalid", "")


@managed_only
def test_what_is_filled_in_anew_is_not_called_wrong_any_longer(page: Page) -> None:
    alert = page.locator(".said [role=alert]")
    press(page, "edit")
    sync_api.expect(page.locator("#about-task [role=alert]")).to_be_visible()
    choose_task(page, "vad")
    sync_api.expect(alert).to_have_count(0)
    field(page, "prompt-text").fill("")
    press(page, "clone")
    sync_api.expect(page.locator("#about-prompt-text [role=alert]")).to_be_visible()
    field(page, "target-text").fill("of another field")
    sync_api.expect(field(page, "target-text")).to_have_value("of another field")
    sync_api.expect(page.locator("#about-prompt-text [role=alert]")).to_be_visible()
    field(page, "prompt-text").fill("said")
    sync_api.expect(alert).to_have_count(0)
    sync_api.expect(field(page, "prompt-text")).not_to_have_attribute("aria-invalid", "")
    field(page, "target-text").fill("")
    press(page, "clone")
    sync_api.expect(page.locator("#about-target-text [role=alert]")).to_be_visible()
    page.locator("#sample-low").click()
    sync_api.expect(alert).to_have_count(0)
    sync_api.expect(field(page, "target-text")).not_to_have_value("")


@managed_only
def test_clone_clones_whatever_the_task_is(page: Page) -> None:
    choose_task(page, "vad")
    press(page, "clone")
    expect_results(page, 1)
    sync_api.expect(page.locator(".said [role=alert]")).to_have_count(0)


@pytest.mark.parametrize(
    ("app", "locale", "size"),
    [("managed", "zh-CN", DESKTOP), ("managed", "en-US", PHONE), ("bare", "en-US", PHONE)],
    indirect=["app"],
)
def test_progress_is_one_readable_line_that_covers_nothing(
    app: RunningApp, gates: Path, new_page: Callable[..., Page], tmp_path: Path, locale: str, size: tuple[int, int]
) -> None:
    page = opened(app, new_page, tmp_path, locale=locale, viewport={"width": size[0], "height": size[1]})
    app.forget_log()
    press(page, "clone")
    expect_results(page, 1)
    gate = "speak"
    if app.managed:
        assert app.post("/gpu/release", {})[0] == 200
        gate = "load"
    close_gate(gates, gate)
    press(page, "clone")
    app.wait_for_line(f"at the gate: {gate}")
    line = page.locator("#progress label")
    expected = {"en-US": ["reading", "1 GB / 4 GB"], "zh-CN": ["读取", "1 GB / 4 GB"]}[locale]
    for part in expected if app.managed else [{"en-US": "generating", "zh-CN": "正在生成"}[locale]]:
        sync_api.expect(line).to_contain_text(part)
    if app.managed:
        assert float(page.locator("#progress progress").get_attribute("value") or 0) == 0.25
        assert "/s" in line.inner_text()
    in_view(page.locator("#progress"))
    assert page.locator(".progress-level, .eta-bar, .progress-text").locator("visible=true").count() == 0, "Gradio's"
    assert "%" not in line.inner_text()
    box, chat = page.locator("#progress").bounding_box(), page.locator("#history").bounding_box()
    assert box
    assert chat
    assert chat["y"] + chat["height"] <= box["y"], "it covers the history"
    assert box["width"] <= size[0]
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/progress-{size[0]}-{locale}-{'managed' if app.managed else 'bare'}.png")
    open_gate(gates, gate)
    expect_results(page, 1)
    sync_api.expect(page.locator("#progress")).to_be_hidden()


def test_a_page_that_closes_while_its_request_waits_has_nothing_computed(
    new_page: Callable[..., Page], tmp_path: Path
) -> None:
    gates = tmp_path / "gates"
    gates.mkdir()
    soon = "import residency.web.server.middleware; residency.web.server.middleware._LINE_CUT_S = 0.2\n"
    with ForkedApp(tmp_path / "recordings", gates=gates, prelude=soon) as app:
        first, page = opened(app, new_page, tmp_path), opened(app, new_page, tmp_path)
        close_gate(gates, "speak")
        press(first, "clone")
        app.wait_for_line("at the gate: speak")
        field(page, "target-text").fill("mine")
        press(page, "clone")
        sync_api.expect(page.locator("#progress")).to_contain_text("you are next")
        with first.expect_response(lambda answer: "/here/" in answer.url):  # later than the line was cut
            page.context.close()
        third = opened(app, new_page, tmp_path)
        press(third, "clone")
        sync_api.expect(third.locator("#progress")).to_contain_text("you are next")
        open_gate(gates, "speak")
        expect_results(third, 1)
        assert "mine" not in app.log
        assert wait_until(lambda: "spoken: said first" in app.log)


def field(page: Page, element: str) -> Locator:
    return page.locator(f"#{element}").locator("input, textarea").first


def press(page: Page, element: str) -> None:
    page.locator(f"#{element}").click()


def upload(page: Page, folder: Path) -> None:
    page.locator("#prompt-audio input[type=file]").set_input_files(write_tone(folder / "prompt.wav"))
    sync_api.expect(page.locator("#prompt-audio audio, #prompt-audio .waveform-container").first).to_be_attached()


def choose_task(page: Page, task: str) -> None:
    page.locator("#task input").click()
    page.get_by_role("option", name=re.compile(rf"(^|\(){task}\)?$")).click()


def expect_results(page: Page, count: int) -> None:
    sync_api.expect(page.locator(LINKS)).to_have_count(count)


def in_view(place: Locator) -> None:
    """Whole, once the page has come to rest."""
    place.page.wait_for_function(
        """element => {
          const {top, bottom, height} = element.getBoundingClientRect();
          return height > 0 && top >= 0 && bottom <= innerHeight;
        }""",
        arg=place.element_handle(),
    )


def beside(place: Locator, control: Locator) -> None:
    gap = "(above, below) => below.getBoundingClientRect().top - above.getBoundingClientRect().bottom"
    assert 0 <= control.evaluate(gap, place.element_handle()) < 40
