"""The GPU panel: it tells the truth without being asked, and does what is pressed by those who may."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from app_process import ForkedApp, RunningApp
from gated_engine import close_gate, open_gate
from recordings import write_tone

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

ARGUMENTS = ("--enable-gpu-management", "--simulate-gpu", "48GB", "--enable-auto-transcribe", "--gpu-keep-warm", "-1")
#: A name of this machine that others can give it too.
NAME = "tts.example.com"


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, gates: Path) -> Iterator[RunningApp]:
    with ForkedApp(tmp_path_factory.mktemp("recordings"), *ARGUMENTS, "--allowed-host", NAME, gates=gates) as app:
        yield app


@pytest.fixture
def app(served: RunningApp) -> RunningApp:
    """As if it had just been started."""
    served.forget_log()
    assert served.post("/gpu/configure", {"keep_warm": -1, "idle_timeout": 600})[0] == 200
    assert served.post("/gpu/release", {})[0] == 200
    return served


@pytest.fixture
def page(app: RunningApp, new_page: Callable[..., Page]) -> Page:
    return visit(new_page(), app.url)


def test_it_follows_what_others_do_without_being_asked(page: Page, app: RunningApp) -> None:
    page.wait_for_function("window.keepsInputs")  # the last thing for which a page asks Gradio when it is opened
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    with page.expect_response(lambda answer: answer.status == 204):
        pass  # there is nothing new
    assert app.post("/gpu/warm", {"model": "tts"})[0] in (200, 202)
    expect_state(page, "gpu")
    sync_api.expect(page.locator("#gpu-past table")).to_contain_text("released → simulated GPU")
    app.post("/gpu/release", {})
    expect_state(page, "released")
    sync_api.expect(page.locator("#gpu-past table")).to_contain_text("simulated GPU → released")
    # An event that the opening of the page began may still have its answer to read.
    asked = [url.partition("?")[0] for url in asked if "/queue/data" not in url]
    assert set(asked) == {f"{app.url}/gpu/panel"}, "Gradio has no part in it"


def test_seconds_pass_without_the_server(page: Page, app: RunningApp) -> None:
    app.post("/gpu/warm", {"model": "tts"})
    expect_state(page, "gpu")
    idle = page.locator("#gpu-status [data-gpu=model-tts] time").first
    first = idle.inner_text()
    sync_api.expect(idle).not_to_have_text(first)
    assert re.fullmatch(r"\d+ s", idle.inner_text())


def test_each_button_does_what_it_says_and_tells_what_came_of_it(page: Page) -> None:
    refused: list[str] = []
    page.on("response", lambda answer: refused.append(answer.url) if answer.status >= 400 else None)
    message = sync_api.expect(page.locator("#gpu-message"))
    for button, model, state, sentence in (
        ("gpu-warm-tts", "tts", "gpu", "tts is on the simulated GPU now."),
        ("gpu-warm-tts", "tts", "gpu", "The model is on the simulated GPU already."),
        ("gpu-offload-tts", "tts", "cpu", "Offloaded to main memory"),
        ("gpu-warm", "asr", "gpu", "tts is on the simulated GPU now.asr is on the simulated GPU now."),
        ("gpu-offload", "asr", "cpu", "Offloaded"),
        ("gpu-release-asr", "asr", "released", "the next request loads it again"),
        ("gpu-release", "tts", "released", "the next request loads it again"),
        ("gpu-warm-asr", "asr", "gpu", "asr is on the simulated GPU now."),
    ):
        page.locator(f"#{button}").click()
        message.to_contain_text(sentence)
        expect_state(page, state, model)
    expect_state(page, "released", "tts")
    page.locator("#gpu-refresh").click()
    expect_state(page, "gpu", "asr")
    assert not refused


def test_what_was_promised_gives_way_to_what_came_of_it(page: Page, app: RunningApp, gates: Path) -> None:
    message = sync_api.expect(page.locator("#gpu-message"))
    close_gate(gates, "load")
    page.locator("#gpu-warm-tts").click()
    app.wait_for_line("at the gate: load")
    message.to_have_text("Loading to the simulated GPU; you can continue working.")
    sync_api.expect(page.locator("[data-gpu=model-tts]")).to_contain_text("reading · 1 GB / 4 GB · ")
    open_gate(gates, "load")
    message.to_have_text("tts is on the simulated GPU now.")
    app.post("/gpu/release", {})
    (gates / "broken").touch()
    page.locator("#gpu-warm-tts").click()
    message.to_have_text("tts: No weights: give a folder")
    (gates / "broken").unlink()
    page.locator("#gpu-warm-tts").click()
    message.to_have_text("tts is on the simulated GPU now.")
    expect_state(page, "gpu")


def test_a_line_that_is_dead_is_noticed(app: RunningApp, new_page: Callable[..., Page]) -> None:
    page = new_page()
    page.add_init_script("const wait = AbortSignal.timeout; AbortSignal.timeout = ms => wait.call(AbortSignal, ms / 8)")
    visit(page, app.url)
    page.route("**/gpu/panel*", lambda route: None)  # nothing comes back, and nobody says so
    app.post("/gpu/warm", {"model": "tts"})
    sync_api.expect(page.locator("#gpu-panel")).to_contain_text("Connection lost; reconnecting")
    page.unroute("**/gpu/panel*")
    expect_state(page, "gpu")
    sync_api.expect(page.locator("#gpu-panel")).not_to_contain_text("Connection lost; reconnecting")


def test_who_waits_reads_why(
    page: Page, app: RunningApp, gates: Path, tmp_path: Path, new_page: Callable[..., Page]
) -> None:
    close_gate(gates, "load")
    close_gate(gates, "speak")
    ask(page, tmp_path)
    app.wait_for_line("at the gate: load")
    expect_progress(page, re.compile(r"To the simulated GPU: reading · 1 GB / 4 GB · [\d.]+ GB/s"), share="0.250")
    open_gate(gates, "load")
    app.wait_for_line("at the gate: speak")
    expect_progress(page, re.compile("The model is ready; generating"), share=None)
    second, third = (visit(new_page(), app.url) for _ in range(2))
    ask(second, tmp_path)
    expect_progress(second, re.compile("The model is in use; you are next"), share=None)
    ask(third, tmp_path)
    expect_progress(third, re.compile("Waiting; place 2 in the queue"), share=None)
    open_gate(gates, "speak")
    for one in (page, second, third):
        sync_api.expect(one.locator("#history .bot-row")).not_to_have_count(0)


def expect_progress(page: Page, sentence: re.Pattern[str], share: str | None) -> None:
    """What is read while waiting, and how far the bar is; None: nobody knows, and it runs to and fro."""
    sync_api.expect(page.locator("#progress label")).to_have_text(sentence)
    bar = page.locator("#progress progress")
    if share is None:
        sync_api.expect(bar).not_to_have_attribute("value", re.compile(""))
    else:
        sync_api.expect(bar).to_have_attribute("value", share)


def test_what_is_pressed_during_a_request_follows_it(page: Page, app: RunningApp, gates: Path, tmp_path: Path) -> None:
    close_gate(gates, "speak")
    ask(page, tmp_path)
    app.wait_for_line("at the gate: speak")
    page.locator("#gpu-release-tts").click()
    sync_api.expect(page.locator("#gpu-message")).to_contain_text(
        "Will be released once the running request or load has ended"
    )
    sync_api.expect(page.locator("#gpu-status")).to_contain_text("In use · Will be released")
    open_gate(gates, "speak")
    expect_state(page, "released")
    sync_api.expect(page.locator("#gpu-message")).to_have_text("tts has been released.")
    sync_api.expect(page.locator("#history .bot-row")).not_to_have_count(0)


def test_how_long_models_stay_is_changed_there(page: Page, app: RunningApp) -> None:
    page.get_by_text("How long models stay").click()
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="tts", exact=True).click()
    now = sync_api.expect(page.locator("[data-gpu=stay]"))
    now.to_contain_text("tts Keep warm: always · Idle timeout: 10 min")
    page.locator("#gpu-apply").click()
    sync_api.expect(page.locator("#gpu-message")).to_contain_text("No time is given")
    page.locator("#gpu-keep-warm input, #gpu-keep-warm textarea").fill("soon")
    page.locator("#gpu-apply").click()
    sync_api.expect(page.locator("#gpu-message")).to_contain_text("'soon' is not a valid duration")
    page.locator("#gpu-keep-warm input, #gpu-keep-warm textarea").fill("90s")
    page.locator("#gpu-idle-timeout input, #gpu-idle-timeout textarea").fill("15m")
    page.locator("#gpu-apply").click()
    sync_api.expect(page.locator("#gpu-message")).to_contain_text("Changed")
    sync_api.expect(page.locator("[data-gpu=model-tts] .gpu-facts")).to_contain_text("15 min")
    now.to_contain_text("tts Keep warm: 90 s · Idle timeout: 15 min")
    models = app.get("/gpu/status")[1]["models"]
    assert (models["tts"]["keep_warm_s"], models["tts"]["idle_timeout_s"]) == (90, 900)
    assert models["asr"]["keep_warm_s"] == -1


@pytest.mark.parametrize(
    ("languages", "seen", "unseen"),
    [
        ("zh-Hans-CN", "加载到 GPU", "Warm up"),
        ("fr-FR", "Warm up", "加载到 GPU"),
        ("yue-HK,zh-HK,en", "加载到 GPU", "Warm up"),
        ("de-DE,en,zh-CN", "Warm up", "加载到 GPU"),
    ],
)
def test_it_speaks_the_language_of_the_browser(
    app: RunningApp, new_page: Callable[..., Page], languages: str, seen: str, unseen: str
) -> None:
    page = new_page(locale=languages.partition(",")[0], extra_http_headers={"Accept-Language": languages})
    names = languages.split(",")
    page.add_init_script(f"Object.defineProperty(navigator, 'languages', {{get: () => {names}}})")
    visit(page, app.url)
    body = sync_api.expect(page.locator("body"))
    body.to_contain_text(seen)
    body.not_to_contain_text(unseen)
    page.locator("#gpu-release").click()
    page.get_by_role("button", name="CLONE", exact=True).click()
    alert = page.locator(".said [role=alert]")
    sync_api.expect(alert).to_be_visible()
    assert page.locator(".toast-body").count() == 0, "it is said twice"
    said = page.locator("#gpu-panel").inner_text() + alert.inner_text() + page.locator("#gpu-message").inner_text()
    assert (re.search("[\u4e00-\u9fff]", said) is None) == (seen == "Warm up"), said
    if seen != "Warm up":
        assert "请" in alert.inner_text()


def test_on_a_phone_nothing_sticks_out(app: RunningApp, new_page: Callable[..., Page]) -> None:
    app.post("/gpu/warm", {})
    page = visit(new_page(viewport={"width": 360, "height": 740}), app.url)
    expect_state(page, "gpu")
    app.post("/gpu/offload", {})
    rate = page.locator("#gpu-past td", has_text="GB/s").first
    for width in (360, 320):
        page.set_viewport_size({"width": width, "height": 740})
        sync_api.expect(rate).to_be_visible()
        for part in page.locator("footer .divider").all() if page.locator("footer button:visible").count() == 0 else []:
            sync_api.expect(part).to_be_hidden()
        right_px = rate.evaluate("cell => cell.getBoundingClientRect().right")
        assert right_px <= width
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for cell in page.locator("#gpu-past td").all():
            assert cell.evaluate("cell => cell.scrollWidth <= cell.clientWidth"), cell.inner_text()
        for button in page.locator("#gpu-panel button").all():
            box = button.bounding_box()
            assert box is None or (box["x"] >= 0 and box["x"] + box["width"] <= width)
        screenshot(page, f"phone-{width}")


#: A loader that takes 12 GB of the card by itself.
_HOLDS_OUTSIDE = """
import os
from residency.devices import SimulatedDevice
charge = SimulatedDevice.charge
def charge_and_hold(self, nbytes):
    charge(self, nbytes)
    self.report_outside(os.getpid(), 12 << 30)
SimulatedDevice.charge = charge_and_hold
"""


def test_memory_outside_the_books_is_a_part_of_the_bar(
    new_page: Callable[..., Page], tmp_path: Path, gates: Path
) -> None:
    arguments = ("--enable-gpu-management", "--simulate-gpu", "48GB", "--gpu-keep-warm", "-1")
    with ForkedApp(tmp_path, *arguments, gates=gates, prelude=_HOLDS_OUTSIDE) as app:
        pages = {language: visit(new_page(locale=language), app.url) for language in ("en", "zh-CN")}
        for page in pages.values():
            sync_api.expect(page.locator("#gpu-panel i[data-part=outside]")).to_have_css("width", "0px")
        app.post("/gpu/warm", {"model": "tts"})
        for width, language, label in (
            (1200, "en", "Unmanaged memory 12 GB"), (390, "en", "Unmanaged"), (390, "zh-CN", "未受管理的显存 12 GB"),
        ):  # fmt: skip
            page = pages[language]
            page.bring_to_front()
            page.set_viewport_size({"width": width, "height": 740})
            part = page.locator("#gpu-panel .gpu-parts i[data-part=outside]")
            share = "part => part.getBoundingClientRect().width / part.parentElement.getBoundingClientRect().width"
            sync_api.expect(page.locator("#gpu-panel .gpu-legend [data-part=outside]")).to_contain_text(label)
            part.evaluate("part => Promise.all(part.getAnimations().map(each => each.finished))")
            assert part.evaluate(share) == pytest.approx(0.25, abs=0.01)
            colours = page.locator("#gpu-panel .gpu-parts i").evaluate_all(
                "parts => parts.map(part => getComputedStyle(part).backgroundColor)"
            )
            assert len(set(colours)) == len(colours)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            screenshot(page, f"outside-{width}-{language}")


def test_who_may_not_press_sees_why(app: RunningApp, new_page: Callable[..., Page]) -> None:
    page = visit(new_page(), app.url.replace("127.0.0.1", NAME))
    refusal = sync_api.expect(page.locator("#gpu-refusal"))
    refusal.to_contain_text("--auth user:password")
    page.get_by_role("button", name="EDIT", exact=True).click()
    sync_api.expect(page.locator(".said [role=alert]")).to_be_visible()
    refusal.to_contain_text("--auth user:password")
    sync_api.expect(page.locator("#gpu-refusal")).to_be_visible()
    page.get_by_text("How long models stay").click()
    for button in ("gpu-warm", "gpu-offload-tts", "gpu-release-asr", "gpu-apply"):
        sync_api.expect(page.locator(f"#{button}")).to_be_disabled()
    sync_api.expect(page.locator("#gpu-refresh")).to_be_enabled()
    app.post("/gpu/warm", {"model": "tts"})
    expect_state(page, "gpu")  # looking is free


def test_two_people_do_not_mix(page: Page, app: RunningApp, new_page: Callable[..., Page], tmp_path: Path) -> None:
    other = visit(new_page(), app.url)
    ask(page, tmp_path, "mine")
    sync_api.expect(page.locator("#history .bot-row")).to_contain_text(["mine"])
    ask(other, tmp_path, "theirs")
    sync_api.expect(other.locator("#history .bot-row")).to_contain_text(["theirs"])
    assert "theirs" not in page.locator("#history").inner_text()
    assert "mine" not in other.locator("#history").inner_text()
    expect_state(other, "gpu")
    expect_state(page, "gpu")


def test_a_page_that_is_loaded_again_during_a_request_works_on(
    page: Page, app: RunningApp, gates: Path, tmp_path: Path
) -> None:
    close_gate(gates, "speak")
    ask(page, tmp_path, "abandoned")
    app.wait_for_line("at the gate: speak")
    page.reload()
    sync_api.expect(page.locator("#gpu-status")).to_contain_text("In use")
    open_gate(gates, "speak")
    sync_api.expect(page.locator("#gpu-status")).not_to_contain_text("In use")
    sync_api.expect(page.locator("#history .bot-row")).to_contain_text(["abandoned"])
    page.locator("#prompt-audio").get_by_label("Clear").click()  # it has survived as well
    ask(page, tmp_path, "again")
    sync_api.expect(page.locator("#history .bot-row")).to_contain_text(["again"])
    assert "Traceback" not in app.log


def test_it_finds_a_server_that_was_started_again(new_page: Callable[..., Page], tmp_path: Path, gates: Path) -> None:
    with ForkedApp(tmp_path, *ARGUMENTS, gates=gates) as first:
        first.post("/gpu/warm", {"model": "tts"})
        page = visit(new_page(), first.url)
        expect_state(page, "gpu")
        page.evaluate("window.ofTheFirst = true")
        assert first.stop() == 0
    sync_api.expect(page.locator("#gpu-panel")).to_contain_text("Connection lost; reconnecting")
    with ForkedApp(tmp_path, *ARGUMENTS, gates=gates, port=first.port):
        expect_state(page, "released")
        sync_api.expect(page.locator("#gpu-panel")).not_to_contain_text("Connection lost; reconnecting")
        page.wait_for_function("!window.ofTheFirst")  # loaded anew, since the second server does not know it
        page.locator("#gpu-warm-tts").click()
        expect_state(page, "gpu")


def test_it_says_that_it_hears_nothing_when_another_answers(page: Page, app: RunningApp) -> None:
    for code, line, call, state in (
        (502, "Connection lost; reconnecting", "warm", "gpu"),
        (401, "sign in", "release", "released"),
        (500, "Connection lost; reconnecting", "warm", "gpu"),
    ):
        page.route("**/gpu/panel*", lambda route, _, code=code: route.fulfill(status=code, body="<h1>by a proxy</h1>"))
        sync_api.expect(page.locator("#gpu-panel [data-gpu=line]")).to_contain_text(line)
        app.post(f"/gpu/{call}", {"model": "tts"})
        page.unroute("**/gpu/panel*")
        expect_state(page, state)
        sync_api.expect(page.locator("#gpu-panel [data-gpu=line]")).to_have_text("")


def visit(page: Page, url: str) -> Page:
    page.goto(url)
    sync_api.expect(chip(page, "tts")).to_be_visible()
    return page


def ask(page: Page, folder: Path, target: str = "to say") -> None:
    page.get_by_label("Prompt Text").fill("said")
    page.locator("#prompt-audio input[type=file]").set_input_files(write_tone(folder / "prompt.wav"))
    sync_api.expect(page.locator("#prompt-audio").get_by_label("Clear")).to_be_visible()
    page.get_by_label("Target Text").fill(target)
    page.get_by_role("button", name="CLONE", exact=True).click()


def chip(page: Page, model: str) -> Locator:
    return page.locator(f"#gpu-status [data-model={model}]")


def expect_state(page: Page, state: str, model: str = "tts") -> None:
    sync_api.expect(chip(page, model)).to_have_attribute("data-state", state)


def screenshot(page: Page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)
