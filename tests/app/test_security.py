"""What strangers may not do: read the server's disk, steer its models, or fill its memory."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import gradio
import httpx
import numpy as np
import phone_recordings
import pytest
import soundfile
from app_process import ROOT, ForkedApp, RunningApp, wait_until
from gradio_client import Client, handle_file
from recordings import write_tone

from residency.launch.command_line import main

SECRET = "nobody is to read this"
PROXIED = {"X-Forwarded-For": "203.0.113.9"}
WAYS = ["queue/join", "run/clone"]
if not gradio.__version__.startswith("5."):  # whose calls end in an error without a word
    WAYS.append("call/clone")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture(scope="module")
def app(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    arguments = ("--enable-gpu-management", "--simulate-gpu", "48GB", "--control-token", "the token", "--max-upload",
                 "1MB", "--max-audio", "20s", "--max-text", "100", "--allowed-host", "lan.example")  # fmt: skip
    with ForkedApp(folder, *arguments, gates=tmp_path_factory.mktemp("gates")) as app:
        yield app


@pytest.fixture(scope="module")
def closed_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    arguments = ("--enable-gpu-management", "--simulate-gpu", "48GB", "--auth", "me:secret", "--control-token", "t")
    folder, gates = (tmp_path_factory.mktemp(name) for name in ("recordings", "gates"))
    with ForkedApp(folder, *arguments, gates=gates) as app:
        yield app


@pytest.fixture
def recording(tmp_path: Path) -> str:
    return write_tone(tmp_path / "prompt.wav", 1)


def client(app: RunningApp, **headers: str) -> Client:
    return Client(app.url, verbose=False, headers=headers)


def ask(app: RunningApp, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = Request(app.url + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def refusal(app: RunningApp, way: str, data: list[Any]) -> str:
    """The sentence with which clone is refused, asked in one of the ways that Gradio has for it."""
    functions = json.loads(ask(app, "/config")[1])["dependencies"]
    clone = next(each["id"] for each in functions if each["api_name"] == "clone")
    said = ask(app, f"/gradio_api/{way}", {"data": data, "fn_index": clone, "session_hash": "stranger"})[1]
    if way == "call/clone":
        said = ask(app, f"/gradio_api/call/clone/{json.loads(said)['event_id']}")[1]
    elif way == "queue/join":
        said = ask(app, "/gradio_api/queue/data?session_hash=stranger")[1]
    error = re.search(r'"error": ?("(?:[^"\\]|\\.)*")', said)
    assert error, said
    return str(json.loads(error[1]))


class TestDisk:
    @pytest.mark.parametrize("prefix", ["/gradio_api/file=", "/gradio_api/file/", "/file=", "/docs/static/"])
    @pytest.mark.parametrize("path", ["{secret}", "/etc/passwd", "app.py", "../../../../etc/passwd", "%2e%2e/app.py"])
    def test_no_file_is_read_through_the_page(self, app: RunningApp, tmp_path: Path, prefix: str, path: str) -> None:
        secret = tmp_path / "secret.txt"
        secret.write_text(SECRET)
        code, said = ask(app, prefix + path.format(secret=secret))
        assert code in (403, 404, 405), (code, said[:200])
        assert SECRET not in said
        assert "root:" not in said

    @pytest.mark.parametrize("where", ["outside", "in the project"])
    def test_no_file_is_given_to_the_engine(self, app: RunningApp, recording: str, where: str) -> None:
        path = recording if where == "outside" else str(ROOT / "README.md")
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        code, said = ask(app, "/gradio_api/call/clone", {"data": [file, "said", "to say"]})
        if code == 200:
            said = ask(app, f"/gradio_api/call/clone/{json.loads(said)['event_id']}")[1]
        assert "event: complete" not in said
        assert "clone-" not in said

    @pytest.mark.parametrize("path", WAYS)
    @pytest.mark.parametrize("data", [[], [{}, "said", "to say"], ["/etc/passwd", "said", "to say"], [[[]], 1, 2]])
    def test_what_cannot_be_read_is_refused_in_both_languages(
        self, app: RunningApp, path: str, data: list[Any]
    ) -> None:
        message = refusal(app, path, data)
        assert "输入无效" in message
        assert "The input is invalid" in message

    @pytest.mark.parametrize("path", WAYS)
    @pytest.mark.parametrize("more", [{}, {"url": "http://127.0.0.1/gradio_api/file=a.wav"}, {"is_stream": True}])
    def test_no_link_is_followed(self, app: RunningApp, path: str, more: dict[str, Any]) -> None:
        file = {"path": "http://127.0.0.1:9/a.wav", "meta": {"_type": "gradio.FileData"}, **more}
        message = refusal(app, path, [file, "said", "to say"])
        assert message == "不接受链接：请上传录音文件 / Upload the recording instead of a link"

    def test_the_folder_of_recordings_has_no_index(self, app: RunningApp, folder: Path) -> None:
        inside = next(folder.glob("editx-*"))
        assert ask(app, f"/gradio_api/file={inside}")[0] in (403, 404)


class TestSteering:
    """The names that Gradio offers to programs check the same permissions as the calls over HTTP."""

    CHANGES = ("/gpu_offload", "/gpu_release", "/gpu_warm")

    @pytest.mark.parametrize("name", CHANGES)
    @pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Host": "evil.example"}])
    def test_a_page_of_another_site_cannot(self, app: RunningApp, name: str, headers: dict[str, str]) -> None:
        said = self.call(app, name, **headers)
        assert "event: complete" not in said
        assert app.model()["state"] == "released"

    @pytest.mark.parametrize("path", ["queue/join", "call/clone", "run/predict", "upload"])
    @pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
                                         {"Origin": "http://evil.example", "Host": "lan.example"}])  # fmt: skip
    def test_a_page_of_another_site_cannot_ask_for_speech_either(
        self, app: RunningApp, path: str, headers: dict[str, str]
    ) -> None:
        code, said = ask(app, f"/gradio_api/{path}", {}, **headers)
        assert (code, "other sites" in said) == (403, True)

    def test_a_page_of_another_site_cannot_read_nor_prepare_to_write(self, app: RunningApp) -> None:
        foreign = {"Origin": "http://evil.example", "Host": "lan.example"}
        assert ask(app, "/gpu/status", **foreign)[0] == 403
        line = http.client.HTTPConnection("127.0.0.1", app.port, timeout=60)
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "X-Forwarded-Host"}
        line.request("OPTIONS", "/gradio_api/queue/join", headers={**foreign, **asked})
        answer = line.getresponse()
        assert answer.status == 403
        assert not [name for name, _ in answer.getheaders() if name.lower().startswith("access-control")]
        line.close()

    @pytest.mark.parametrize("name", CHANGES)
    def test_this_machine_and_the_token_can(self, app: RunningApp, name: str) -> None:
        assert "event: complete" in self.call(app, name)
        assert "event: complete" in self.call(app, name, Host="evil.example", Authorization="Bearer the token")
        assert wait_until(lambda: app.post("/gpu/release", {})[0] == 200)

    def test_everybody_may_look(self, app: RunningApp) -> None:
        assert "event: complete" in self.call(app, "/gpu_status", Host="lan.example")

    def call(self, app: RunningApp, name: str, **headers: str) -> str:
        data = [] if name == "/gpu_status" else [""]
        code, said = ask(app, f"/gradio_api/call{name}", {"data": data}, **headers)
        if code != 200:
            return said
        return ask(app, f"/gradio_api/call{name}/{json.loads(said)['event_id']}", **headers)[1]


class TestLimits:
    def test_a_long_text_is_refused(self, app: RunningApp, recording: str) -> None:
        with pytest.raises(Exception, match=r"101 characters.*--max-text.*超过 100"):
            client(app).predict(handle_file(recording), "said", "x" * 101, api_name="/clone")
        with pytest.raises(Exception, match="--max-text"):
            client(app).predict(handle_file(recording), "x" * 101, "vad", api_name="/edit")
        assert client(app).predict(handle_file(recording), "said", "x" * 100, api_name="/clone")

    def test_a_long_recording_is_refused_however_small_its_file_is(self, app: RunningApp, tmp_path: Path) -> None:
        path = tmp_path / "bomb.flac"
        soundfile.write(path, np.zeros(16000 * 3600, np.int16), 16000)
        assert path.stat().st_size < 1 << 20
        with pytest.raises(Exception, match=r"longer than 20 s.*--max-audio"):
            client(app).predict(handle_file(str(path)), "said", "to say", api_name="/clone")

    def test_one_of_many_channels_is_refused_however_short_it_seems(self, app: RunningApp, tmp_path: Path) -> None:
        path = tmp_path / "channels.flac"
        soundfile.write(path, np.zeros((192_000 * 19, 8), np.int16), 192_000)
        assert path.stat().st_size < 1 << 20
        with pytest.raises(Exception, match=r"more samples than 20 s.*mono.*采样数"):
            client(app).predict(handle_file(str(path)), "said", "to say", api_name="/clone")

    def test_a_request_that_is_no_upload_is_not_read_without_end(self, app: RunningApp) -> None:
        pieces = [b'{"data": ["', *[b"x" * (1 << 18)] * 16, b'"]}']
        for path in ("/gradio_api/queue/join", "/gradio_api/call/clone", "/gradio_api/run/clone"):
            assert self.sent_in_pieces(app, path, "application/json", pieces)

    def test_files_are_refused_that_are_too_large_together(self, app: RunningApp, folder: Path) -> None:
        head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="%d.wav"\r\n\r\n'
        files = [piece for number in range(3) for piece in (head % number, b"x" * (1 << 19), b"\r\n")]
        form = "multipart/form-data; boundary=b"
        assert self.sent_in_pieces(app, "/gradio_api/upload", form, [*files, b"--b--\r\n"])
        assert wait_until(lambda: self.leftovers(folder) == [])

    def sent_in_pieces(self, app: RunningApp, path: str, kind: str, pieces: list[bytes]) -> bool:
        """Whether a body is refused for its size, which is not told."""
        with socket.create_connection(("127.0.0.1", app.port), timeout=60) as line:
            told = f"Host: 127.0.0.1\r\nTransfer-Encoding: chunked\r\nContent-Type: {kind}"
            line.sendall(f"POST {path} HTTP/1.1\r\n{told}\r\n\r\n".encode())
            try:
                for piece in (*pieces, b""):
                    line.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            except OSError:
                pass  # it has hung up already
            return b" 413 " in line.recv(100)

    def test_a_large_file_is_refused(self, app: RunningApp, tmp_path: Path, folder: Path) -> None:
        path = write_tone(tmp_path / "large.wav", 40)
        with pytest.raises(Exception, match="exceeds the maximum file size"):
            client(app).predict(handle_file(path), "said", "to say", api_name="/clone")
        code, said = ask(app, "/gradio_api/upload", "x" * (2 << 20))
        assert code == 413
        assert "--max-upload" in said
        assert self.leftovers(folder) == []

    def test_anonymous_uploads_do_not_fill_the_disk(self, tmp_path: Path) -> None:
        with ForkedApp(tmp_path / "recordings", "--max-disk", "2MB", gates=tmp_path) as app:
            codes = [
                httpx.post(f"{app.url}/gradio_api/upload", files={"files": bytes([number]) * 500_000}).status_code
                for number in range(7)
            ]
        assert codes == [200] * 4 + [507] * 3

    def test_nor_do_uploads_at_the_same_time(self, tmp_path: Path) -> None:
        with ForkedApp(tmp_path / "recordings", "--max-disk", "2MB", gates=tmp_path) as app, ExitStack() as lines:
            for _ in range(4):
                line = lines.enter_context(socket.create_connection(("127.0.0.1", app.port), timeout=60))
                line.sendall(
                    b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 500000\r\n"
                    b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
                    b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.wav"\r\n\r\n' + b"x" * 1000
                )
            assert wait_until(lambda: len(self.leftovers(tmp_path / "recordings")) == 4), "they have begun"
            answer = httpx.post(f"{app.url}/gradio_api/upload", files={"files": b"x" * 500_000})
            assert answer.status_code == 507

    def test_nor_do_conversions_and_results(self, tmp_path: Path) -> None:
        silence = phone_recordings.record(tmp_path / "iphone.m4a", seconds=20)
        with ForkedApp(tmp_path / "recordings", "--max-disk", "1MB", gates=tmp_path) as app:
            client = Client(app.url, verbose=False)
            with pytest.raises(Exception, match=r"--max-disk"):
                client.predict(handle_file(str(silence)), "said", "to say", api_name="/clone")
            size = sum(path.stat().st_size for path in (tmp_path / "recordings").rglob("*") if path.is_file())
            assert size < 1 << 20
            assert app.log.count("spoken") == 0

    def test_one_whose_size_is_not_told_is_refused_too(self, app: RunningApp, folder: Path) -> None:
        head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.wav"\r\n\r\n'
        pieces = [head, *[b"x" * (1 << 18)] * 8, b"\r\n--b--\r\n"]
        assert self.sent_in_pieces(app, "/gradio_api/upload", "multipart/form-data; boundary=b", pieces)
        assert wait_until(lambda: self.leftovers(folder) == [])

    def test_an_upload_that_is_given_up_leaves_nothing(self, app: RunningApp, folder: Path) -> None:
        app.forget_log()
        with socket.create_connection(("127.0.0.1", app.port), timeout=60) as line:
            line.sendall(
                b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 500000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
                b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.wav"\r\n\r\n' + b"x" * 100_000
            )
            assert wait_until(lambda: self.leftovers(folder) != []), "it has begun"
        assert wait_until(lambda: self.leftovers(folder) == [])
        assert "Traceback" not in app.log

    def leftovers(self, folder: Path) -> list[Path]:
        return list(folder.glob("editx-*/tmp*"))


class TestSignedOut:
    """Where the page asks for a password."""

    def test_they_wake_no_model(self, closed_app: RunningApp) -> None:
        for path in ("/gradio_api/upload", "/nonsense/upload"):
            assert ask(closed_app, path, {}, **PROXIED)[0] in (401, 404)
        assert closed_app.model()["state"] == "released"

    def test_they_do_not_look_but_health_checks_do(self, closed_app: RunningApp) -> None:
        for path in ("/gpu/status", "/gpu/history", "/gpu/panel", "/metrics", "/gpu/events"):
            assert ask(closed_app, path, **PROXIED)[0] == 401
        for path in ("/healthz", "/readyz"):
            assert ask(closed_app, path, **PROXIED)[0] == 200

    def test_this_machine_the_token_and_who_has_signed_in_do(self, closed_app: RunningApp) -> None:
        assert main(["status", "--url", closed_app.url]) == 0
        for path in ("/gpu/status", "/metrics"):
            assert ask(closed_app, path)[0] == 200
            assert ask(closed_app, path, **PROXIED, Authorization="Bearer t")[0] == 200
        with httpx.Client(base_url=closed_app.url, headers=PROXIED) as browser:
            browser.post("/login", data={"username": "me", "password": "wrong"})
            assert browser.get("/gpu/status").status_code == 401
            assert browser.post("/login", data={"username": "me", "password": "secret"}).status_code == 200
            assert browser.get("/gpu/status").status_code == 200
            assert browser.post("/gpu/release").status_code == 200
            assert browser.post("/gpu/release", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
