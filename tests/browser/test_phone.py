"""A page in one column, as on a phone: what a press has made comes into view."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from app_process import ForkedApp, RunningApp
from gated_engine import close_gate, open_gate

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

PHONE = {"viewport": {"width": 390, "height": 844}, "locale": "zh-CN"}


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, gates: Path) -> Iterator[RunningApp]:
    with ForkedApp(tmp_path_factory.mktemp("recordings"), "--enable-gpu-management", gates=gates) as app:
        yield app


@pytest.fixture
def page(app: RunningApp, new_page: Callable[..., Page]) -> Page:
    """A page with the result of a CLONE, on which a task is chosen."""
    app.forget_log()
    page = new_page(**PHONE)
    page.goto(app.url)
    page.wait_for_function("window.keepsInputs")
    page.locator("#sample-low").click()
    sync_api.expect(page.locator("#prompt-audio").get_by_label("清除")).to_be_visible()
    page.locator("#clone").click()
    expect_newest_in_view(page, 1)
    page.locator("#task input").click()
    page.get_by_role("option", name=re.compile("vad")).click()
    return page


def test_the_newest_result_is_in_view_after_each_press(page: Page) -> None:
    for count in (2, 3):
        page.locator("#edit").click()
        expect_newest_in_view(page, count)
        screenshot(page, f"edit-{count}")
    page.locator("#clone").click()
    expect_newest_in_view(page, 1)
    screenshot(page, "clone-again")


def test_the_view_of_somebody_who_types_stays(page: Page, app: RunningApp, gates: Path) -> None:
    close_gate(gates, "edit")
    page.locator("#edit").click()
    app.wait_for_line("at the gate: edit")
    field = page.locator("#prompt-text textarea, #prompt-text input").first
    field.fill("what I say next")
    before = page.evaluate("scrollY")
    open_gate(gates, "edit")
    sync_api.expect(results(page)).to_have_count(2)
    sync_api.expect(page.locator("#progress")).to_be_hidden()
    page.wait_for_timeout(500)  # in which nothing happens
    assert page.evaluate("scrollY") == before
    sync_api.expect(field).to_be_focused()


def test_names_of_tasks_are_shown_whole(app: RunningApp, new_page: Callable[..., Page]) -> None:
    page = new_page(**PHONE)
    page.goto(app.url)
    page.wait_for_function("window.keepsInputs")
    for name in ("去除停顿（vad）", "克隆音色（clone）"):
        page.locator("#task input").click()
        page.get_by_role("option", name=name).click()
        sync_api.expect(page.locator("#task input")).to_have_value(name)
        assert page.locator("#task input").evaluate("input => input.scrollWidth <= input.clientWidth"), name
    task, sub_task = (page.locator(element).bounding_box() for element in ("#task", "#sub-task"))
    assert task
    assert sub_task
    assert task["y"] + task["height"] <= sub_task["y"]


def test_a_progress_of_unknown_share_moves_instead_of_looking_finished(
    page: Page, app: RunningApp, gates: Path
) -> None:
    close_gate(gates, "edit")
    page.locator("#edit").click()
    app.wait_for_line("at the gate: edit")
    progress = page.locator("#progress progress")
    sync_api.expect(progress).to_be_visible()
    sync_api.expect(progress).not_to_have_attribute("value", re.compile(""))
    assert progress.evaluate("element => element.getAnimations().length") == 1
    screenshot(page, "progress")
    open_gate(gates, "edit")
    expect_newest_in_view(page, 2)


def results(page: Page) -> Locator:
    return page.locator("#history .bot-row")


def expect_newest_in_view(page: Page, count: int) -> None:
    sync_api.expect(results(page)).to_have_count(count)
    page.wait_for_function(
        """row => {
          const {top, bottom} = row.getBoundingClientRect();
          const player = row.querySelector("audio, .waveform-container, .waveform-wrapper");
          return player && top >= 0 && bottom <= innerHeight;
        }""",
        arg=results(page).last.element_handle(),
        timeout=30_000,
    )


def screenshot(page: Page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/phone-{name}.png")
