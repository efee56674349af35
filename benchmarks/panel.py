"""Measures the app's CPU time for idle pages.

    python benchmarks/panel.py

In turns, in one run: no page, one page in Chromium, five, and one in a hidden tab. The model is on a simulated card
with a deadline, so that pages show a countdown. Exits with 1 if one page takes 1 % of a core or more.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import psutil
from app_process import RunningApp
from playwright.sync_api import Browser, sync_playwright

MOST_PERCENT = 1.0
ARGUMENTS = ("--enable-gpu-management", "--simulate-gpu", "48GB", "--gpu-keep-warm", "1h")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="of each look (20)")
    parser.add_argument("--turns", type=int, default=3, help="how often each is looked at (3)")
    options = parser.parse_args()
    print(f"{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores, {options.turns} turns")
    percents: dict[str, list[float]] = {"no page": [], "one page": [], "five pages": [], "one page, hidden": []}
    with (
        tempfile.TemporaryDirectory() as home,
        RunningApp(Path(home), *ARGUMENTS) as app,
        sync_playwright() as chromium,
    ):
        browser = chromium.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        app.post("/gpu/warm", {})
        process = psutil.Process(app.process.pid)
        for _ in range(options.turns):
            for name, pages in (("no page", 0), ("one page", 1), ("five pages", 5), ("one page, hidden", 1)):
                close = open_pages(browser, app.url, pages, hidden="hidden" in name)
                percents[name].append(cpu_percent(process, options.seconds))
                close()
        browser.close()
    print(f"\n{'':20}{'% of one core, median':>24}{'least':>8}{'most':>8}")
    for name, values in percents.items():
        print(f"{name:20}{statistics.median(values):24.2f}{min(values):8.2f}{max(values):8.2f}")
    sys.exit(1 if statistics.median(percents["one page"]) >= MOST_PERCENT else 0)


def open_pages(browser: Browser, url: str, count: int, hidden: bool):
    """Opens pages that show the model; returns a function that closes them."""
    context = browser.new_context()
    if hidden:  # a headless browser shows all of its tabs
        context.add_init_script("Object.defineProperty(document, 'hidden', {get: () => Boolean(window.away)})")
    for _ in range(count):
        page = context.new_page()
        page.goto(url)
        page.wait_for_selector("#gpu-status [data-model=tts]")
        if hidden:
            page.evaluate("window.away = true; document.dispatchEvent(new Event('visibilitychange'))")
    time.sleep(3)  # excludes the cost of opening
    return context.close


def cpu_percent(process: psutil.Process, seconds: float) -> float:
    before, began_s = sum(process.cpu_times()[:2]), time.perf_counter()
    time.sleep(seconds)
    return 100 * (sum(process.cpu_times()[:2]) - before) / (time.perf_counter() - began_s)


if __name__ == "__main__":
    main()
