"""What strangers may not do: read the server's disk, steer its models, or fill its memory."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import soundfile
from gradio_client import Client, handle_file
from serving import ROOT, RunningApp, wait_until

SECRET = "nobody is to read this"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture(scope="module")
def app(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    arguments = ("--enable-gpu-management", "--simulate-gpu", "48GB", "--control-token", "the token", "--max-upload",
                 "1MB", "--max-audio", "20s", "--max-text", "100")  # fmt: skip
    with RunningApp(folder, *arguments, gates=tmp_path_factory.mktemp("gates")) as app:
        yield app


@pytest.fixture
def recording(tmp_path: Path) -> str:
    return sound(tmp_path / "prompt.wav", 1)


def sound(path: Path, seconds: float, **keywords: Any) -> str:
    soundfile.write(path, np.sin(np.arange(round(16000 * seconds)) * 0.03), 16000, **keywords)
    return str(path)


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

    def test_the_folder_of_recordings_has_no_index(self, app: RunningApp, folder: Path) -> None:
        inside = next(folder.glob("editx-*"))
        assert ask(app, f"/gradio_api/file={inside}")[0] in (403, 404)


class TestSteering:
    """The names that Gradio offers to programs ask the same guard as the calls over HTTP."""

    CHANGES = ("/gpu_offload", "/gpu_release", "/gpu_warm")

    @pytest.mark.parametrize("name", CHANGES)
    @pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Host": "evil.example"}])
    def test_a_page_of_another_site_cannot(self, app: RunningApp, name: str, headers: dict[str, str]) -> None:
        said = self.call(app, name, **headers)
        assert "event: complete" not in said
        assert app.model()["state"] == "released"

    @pytest.mark.parametrize("path", ["queue/join", "call/clone", "run/predict", "upload"])
    def test_a_page_of_another_site_cannot_ask_for_speech_either(self, app: RunningApp, path: str) -> None:
        code, said = ask(app, f"/gradio_api/{path}", {}, **{"Sec-Fetch-Site": "cross-site"})
        assert (code, "other sites" in said) == (403, True)

    @pytest.mark.parametrize("name", CHANGES)
    def test_this_machine_and_the_token_can(self, app: RunningApp, name: str) -> None:
        assert "event: complete" in self.call(app, name)
        assert "event: complete" in self.call(app, name, Host="evil.example", Authorization="Bearer the token")
        assert wait_until(lambda: app.post("/gpu/release", {})[0] == 200)

    def test_everybody_may_look(self, app: RunningApp) -> None:
        assert "event: complete" in self.call(app, "/gpu_status", Host="evil.example")

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

    def test_a_large_file_is_refused(self, app: RunningApp, tmp_path: Path, folder: Path) -> None:
        path = sound(tmp_path / "large.wav", 40)
        with pytest.raises(Exception, match="exceeds the maximum file size"):
            client(app).predict(handle_file(path), "said", "to say", api_name="/clone")
        code, said = ask(app, "/gradio_api/upload", "x" * (2 << 20))
        assert code == 413
        assert "--max-upload" in said
        assert self.leftovers(folder) == []

    def test_one_whose_size_is_not_told_is_refused_too(self, app: RunningApp, folder: Path) -> None:
        with socket.create_connection(("127.0.0.1", app.port), timeout=60) as line:
            line.sendall(
                b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
            )
            head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.wav"\r\n\r\n'
            try:
                for piece in (head, *[b"x" * (1 << 18)] * 8, b"\r\n--b--\r\n", b""):
                    line.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            except OSError:
                pass  # it has hung up already
            assert b"413" in line.recv(100)
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
