"""What phones record is uploaded by the page, by ``gradio_client`` and by curl's requests, and spoken from."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import Request, urlopen

import phone_recordings
import pytest
import soundfile
from app_process import ForkedApp, RunningApp
from gated_engine import close_gate, open_gate
from gradio_client import Client, handle_file

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

GIVEN = "#prompt-audio input[type=file]"
LIMIT_S = 5


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    folder = tmp_path_factory.mktemp("app")
    (folder / "gates").mkdir()
    arguments = ("--enable-gpu-management", "--simulate-gpu", "48GB", "--enable-auto-transcribe")
    limit = ("--max-audio", str(LIMIT_S))
    with ForkedApp(folder / "recordings", *arguments, *limit, gates=folder / "gates") as app:
        yield app
        assert "Traceback" not in app.log


@pytest.fixture
def page(app: RunningApp, new_page: Callable[..., Page]) -> Page:
    app.forget_log()
    return opened(new_page(), app)


def opened(page: Page, app: RunningApp) -> Page:
    """The page of the app, once its scripts have run: the panel's comes after that of uploads."""
    page.goto(app.url)
    sync_api.expect(page.locator("#gpu-status [data-model=tts]")).to_be_visible()
    return page


def message(page: Page) -> Locator:
    return page.locator("#about-prompt-audio")


class TestPage:
    @pytest.mark.parametrize("name", ["iphone.m4a", "camera.mp4", "old.amr"])  # sound, video, unknown to browsers
    def test_a_phones_recording_is_heard_once_played_and_spoken_from(
        self, page: Page, app: RunningApp, tmp_path: Path, name: str
    ) -> None:
        with page.expect_response(re.compile(r"file=.*/recording\.wav")) as played:
            page.locator(GIVEN).set_input_files(str(phone_recordings.record(tmp_path / name)))
        assert played.value.body()[:4] == b"RIFF"
        sync_api.expect(page.get_by_label("Prompt Text")).to_have_value(re.compile(r"^\d+ samples$"))
        page.get_by_label("Target Text").fill("to say")
        page.get_by_role("button", name="CLONE", exact=True).click()
        sync_api.expect(page.locator("#history .bot-row")).not_to_have_count(0)
        assert message(page).inner_text().strip() == ""
        assert app.log.count("heard:") == 1

    def test_one_that_is_dropped_on_the_page(self, page: Page, tmp_path: Path) -> None:
        content = list(phone_recordings.record(tmp_path / "browser.webm").read_bytes())
        dropped = page.evaluate_handle(
            """content => {
              const transfer = new DataTransfer();
              transfer.items.add(new File([new Uint8Array(content)], "memo.webm", {type: "video/webm"}));
              return transfer;
            }""",
            content,
        )
        target = page.locator("#prompt-audio").get_by_text("Drop Audio Here")
        with page.expect_response(re.compile(r"file=.*/recording\.wav")):
            target.dispatch_event("drop", {"dataTransfer": dropped})

    def test_what_cannot_be_read_is_said_at_once_and_goes_with_the_next(self, page: Page, tmp_path: Path) -> None:
        (tmp_path / "broken.m4a").write_bytes(phone_recordings.record(tmp_path / "iphone.m4a").read_bytes()[:5000])
        page.locator(GIVEN).set_input_files(str(tmp_path / "broken.m4a"))
        sync_api.expect(message(page)).to_contain_text("The recording cannot be read")
        sync_api.expect(page.locator("#prompt-audio").get_by_label("Clear")).to_have_count(0)
        page.locator(GIVEN).set_input_files(str(tmp_path / "iphone.m4a"))
        sync_api.expect(message(page)).to_have_text("")
        sync_api.expect(page.locator("#prompt-audio").get_by_label("Clear")).to_have_count(1)

    def test_a_long_one_and_what_is_no_sound_are_refused_in_the_language_of_the_page(
        self, app: RunningApp, new_page: Callable[..., Page], tmp_path: Path
    ) -> None:
        page = opened(new_page(locale="zh-CN"), app)
        page.locator(GIVEN).set_input_files(str(phone_recordings.record(tmp_path / "old.3gp", seconds=LIMIT_S + 1)))
        sync_api.expect(message(page)).to_contain_text("超过 5 秒")
        (tmp_path / "letter.txt").write_text("no sound")
        page.locator(GIVEN).set_input_files(str(tmp_path / "letter.txt"))
        sync_api.expect(message(page)).to_contain_text("无法读取")
        assert " / " not in message(page).inner_text()

    def test_the_microphone(self, page: Page) -> None:
        recorder = page.locator("#prompt-audio")
        recorder.get_by_label("Record audio").click()
        recorder.get_by_role("button", name="Record", exact=True).click()
        sync_api.expect(recorder.get_by_text("0:01").first).to_be_visible()
        recorder.get_by_role("button", name="Stop").first.click()
        sync_api.expect(page.get_by_label("Prompt Text")).to_have_value(re.compile(r"^\d+ samples$"))
        assert message(page).inner_text().strip() == ""


# Recordings called slow wait at a gate before they are converted.
_SLOW = """
import gated_engine
from residency.web.speech.conversion import Conversion
def decode(self, source, *more, decode=Conversion._decode):
    if "slow" in source:
        gated_engine._pass("convert")
    decode(self, source, *more)
Conversion._decode = decode
"""


class TestWhileItIsConverted:
    @pytest.fixture
    def gates(self, tmp_path: Path) -> Path:
        (tmp_path / "gates").mkdir()
        close_gate(tmp_path / "gates", "convert")
        return tmp_path / "gates"

    @pytest.fixture
    def app(self, tmp_path: Path, gates: Path) -> Iterator[RunningApp]:
        with ForkedApp(tmp_path / "recordings", "--enable-gpu-management", gates=gates, prelude=_SLOW) as app:
            yield app

    @pytest.mark.parametrize("readable", [True, False])
    def test_another_one_takes_its_place_for_good(
        self, app: RunningApp, gates: Path, page: Page, tmp_path: Path, readable: bool
    ) -> None:
        slow, quick = (
            phone_recordings.record(tmp_path / "slow.m4a", "iphone.m4a"),
            phone_recordings.record(tmp_path / "browser.webm"),
        )
        if not readable:
            slow.write_bytes(slow.read_bytes()[:5000])
        page.locator(GIVEN).set_input_files(str(slow))
        app.wait_for_line("at the gate: convert")
        page.locator("#prompt-audio").get_by_label("Clear").click()
        with page.expect_response(re.compile(r"file=.*/recording\.wav")) as played:
            page.locator(GIVEN).set_input_files(str(quick))
        open_gate(gates, "convert")
        sync_api.expect(page.locator("#prompt-audio .minimal .progress-text")).to_be_hidden()
        page.get_by_label("Prompt Text").fill("said")
        page.get_by_label("Target Text").fill("to say")
        page.get_by_role("button", name="CLONE", exact=True).click()
        sync_api.expect(page.locator("#history .bot-row")).not_to_have_count(0)
        assert played.value.url.rpartition("/recordings/")[2] in app.log
        assert message(page).inner_text().strip() == ""


class TestPrograms:
    @pytest.mark.parametrize("name", ["iphone.m4a", "camera.mp4"])  # tests/web/test_conversion.py has all formats
    def test_gradio_client(self, app: RunningApp, tmp_path: Path, name: str) -> None:
        client = Client(app.url, verbose=False)
        given = handle_file(str(phone_recordings.record(tmp_path / name)))
        assert soundfile.info(client.predict(given, "said", "to say", api_name="/clone")).duration == 1.0
        assert soundfile.info(client.predict(given, "said", "vad", None, None, api_name="/edit")).duration == 1.0

    def test_gradio_client_reads_why_not(self, app: RunningApp, tmp_path: Path) -> None:
        client = Client(app.url, verbose=False)
        long = phone_recordings.record(tmp_path / "iphone.m4a", seconds=LIMIT_S + 1)
        with pytest.raises(Exception, match=r"longer than 5 s.*--max-audio.*超过 5 秒"):
            client.predict(handle_file(str(long)), "said", "to say", api_name="/clone")
        (tmp_path / "broken.m4a").write_bytes(long.read_bytes()[:9000])
        with pytest.raises(Exception, match=r"cannot be read.*无法读取该录音"):
            client.predict(handle_file(str(tmp_path / "broken.m4a")), "said", "vad", None, None, api_name="/edit")

    def test_requests_of_curl_use_one_upload_twice(self, app: RunningApp, tmp_path: Path) -> None:
        path = self.upload(app, phone_recordings.record(tmp_path / "iphone.m4a"))
        folders = set(app.tmp_dir.rglob("recording.wav"))
        for _ in range(2):
            assert "event: complete" in self.call(app, "clone", [self.file(path), "said", "to say"])
        assert len(set(app.tmp_dir.rglob("recording.wav")) - folders) == 1
        broken = tmp_path / "broken.m4a"
        broken.write_bytes(b"no sound")
        said = self.call(app, "clone", [self.file(self.upload(app, broken)), "said", "to say"])
        assert "event: error" in said
        reason = json.loads(said.split("data: ")[1])  # Gradio 5 gives none this way
        assert reason is None or "cannot be read" in reason["error"]

    def file(self, path: str) -> dict[str, object]:
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    def upload(self, app: RunningApp, file: Path) -> str:
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n\r\n'
        body = head.encode() + file.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        with urlopen(Request(f"{app.url}/gradio_api/upload", body, kind), timeout=60) as answer:
            return str(json.load(answer)[0])

    def call(self, app: RunningApp, name: str, data: list[object]) -> str:
        url, kind = f"{app.url}/gradio_api/call/{name}", {"Content-Type": "application/json"}
        with urlopen(Request(url, json.dumps({"data": data}).encode(), kind), timeout=60) as answer:
            event = json.load(answer)["event_id"]
        with urlopen(f"{url}/{event}", timeout=60) as answer:
            return str(answer.read().decode())
