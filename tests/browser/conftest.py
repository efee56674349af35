from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
#: ``tts.example.com`` and its like, as from another machine, are this one.
ARGUMENTS = [
    "--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
    "--host-resolver-rules=MAP *.example.com 127.0.0.1",
]  # fmt: skip
#: How long a page may take to do what it should, in milliseconds: the machine that runs the tests can be a busy one.
PATIENCE_MS = 90_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real one, for the tests of a file. Where none is, they are skipped, or fail if ``REQUIRE_BROWSER`` is set."""
    try:
        from playwright.sync_api import expect, sync_playwright
    except ImportError:
        sync_playwright = None
    if CHROMIUM is None or sync_playwright is None:
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip)("needs playwright and a Chromium")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages, each in a session of its own, until the test ends; takes what `Browser.new_page` takes."""

    def new_page(**options: Any) -> Page:
        page = browser.new_page(**{"viewport": {"width": 1200, "height": 1100}, **options})
        page.set_default_timeout(PATIENCE_MS)
        return page

    yield new_page
    for context in browser.contexts:
        context.close()
