"""``python -m gpu_manager speak`` against a small server that answers as the app's speech API does."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from local_server import serving

from residency.launch import command_line, speak
from residency.web.api.openai_schema import AudioFormat
from residency.web.speech.encoding import MEDIA_TYPES

ROOT = Path(__file__).resolve().parents[2]
SPEECH = os.urandom(300_000)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        self.close_connection = True
        self.server.answer(self)

    def begin(self, code: int, kind: str, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def log_message(self, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = False
    seen: list[tuple[str, dict[str, object], str | None]]
    answer: Callable[[Handler], None]


def speech(handler: Handler) -> None:
    handler.begin(200, "audio/wav", Transfer_Encoding="chunked")
    for at in range(0, len(SPEECH), 100_000):
        handler.chunk(SPEECH[at : at + 100_000])
    handler.chunk(b"")


def refusal(code: int, content: object, kind: str = "application/json") -> Callable[[Handler], None]:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()

    def answer(handler: Handler) -> None:
        handler.begin(code, kind, Content_Length=str(len(data)))
        handler.wfile.write(data)

    return answer


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.delenv("GPU_TTS_API_KEY", raising=False)
    server = Server(("127.0.0.1", 0), Handler)
    server.seen, server.answer = [], speech
    with serving(server):
        yield server


def arguments(app: Server, *more: str) -> list[str]:
    return ["speak", "Hello!", "--voice", "Ada", "--url", f"127.0.0.1:{app.server_port}/", *more]


def run(app: Server, *more: str) -> int:
    return command_line.main(arguments(app, *more))


def test_the_speech_is_saved(app: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.wav"
    assert run(app, "-o", str(output)) == 0
    assert output.read_bytes() == SPEECH
    assert stat.S_IMODE(output.stat().st_mode) & 0o400
    assert list(tmp_path.iterdir()) == [output]
    assert app.seen == [("/v1/audio/speech", {"input": "Hello!", "voice": "Ada", "response_format": "wav"}, None)]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "more", "format"),
    [("a.mp3", [], "mp3"), ("a.OGG", [], "opus"), ("a.opus", [], "opus"), ("a", [], "wav"), ("a.txt", [], "wav"),
     ("a.mp3", ["--format", "flac"], "flac"), ("a.pcm", [], "pcm"), ("a.aac", [], "aac")],
)  # fmt: skip
def test_the_format_is_that_of_the_file_name(
    app: Server, tmp_path: Path, name: str, more: list[str], format: str
) -> None:
    assert run(app, "-o", str(tmp_path / name), *more) == 0
    assert app.seen[0][1]["response_format"] == format


def test_what_is_given_is_sent(app: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = ["-o", str(tmp_path / "a")]
    assert run(app, *output, "--speed", "1.5", "--instructions", "happy", "--api-key", "secret") == 0
    _, body, authorization = app.seen.pop()
    assert (body["speed"], body["instructions"], authorization) == (1.5, "happy", "Bearer secret")
    monkeypatch.setenv("GPU_TTS_API_KEY", "other\n")
    assert run(app, *output) == 0
    assert app.seen.pop()[2] == "Bearer other"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("你好。\nHello \xff.".encode() + b"\xff")))
    assert command_line.main(["speak", "-", *arguments(app)[2:], *output]) == 0
    assert app.seen.pop()[1]["input"] == "你好。\nHello ÿ.\ufffd"


def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(app: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(app, "-o", "-", "--api-key", "s3cret\x07")
    said = capsys.readouterr().err
    assert "--api-key" in said
    assert "s3cret" not in said
    assert app.seen == []


def test_speech_goes_to_standard_output(app: Server, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run(app, "-o", "-") == 0
    assert capfdbinary.readouterr() == (SPEECH, b"")
    assert run(app) == 0
    assert capfdbinary.readouterr() == (SPEECH, b"")


def test_a_terminal_gets_no_speech_unless_that_is_wanted(
    app: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with pytest.raises(SystemExit) as ended:
        run(app)
    assert ended.value.code == 2
    assert "give a file (-o speech.wav)" in capsys.readouterr().err
    assert app.seen == []


def test_a_program_that_wants_no_more_is_no_error_to_show(app: Server) -> None:
    command = [sys.executable, "-m", "gpu_manager", *arguments(app, "-o", "-")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == SPEECH[:1]
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_each_part_is_written_at_once(app: Server, tmp_path: Path) -> None:
    """Into what is no file too, such as a pipe, which stays one."""
    heard = threading.Event()

    def waiting(handler: Handler) -> None:
        handler.begin(200, "audio/mpeg", Transfer_Encoding="chunked")
        handler.chunk(b"first")
        assert heard.wait(60)
        handler.chunk(b"last")
        handler.chunk(b"")

    app.answer = waiting
    pipe = tmp_path / "pipe.mp3"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(run, app, "-o", str(pipe))
        with pipe.open("rb") as reader:
            assert reader.read(5) == b"first"
            heard.set()
            assert reader.read() == b"last"
        assert ended.result() == 0
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def cut_chunk(handler: Handler) -> None:
    handler.begin(200, "audio/wav", Transfer_Encoding="chunked")
    handler.wfile.write(b"10\r\nhalf")


def no_last_chunk(handler: Handler) -> None:
    handler.begin(200, "audio/wav", Transfer_Encoding="chunked")
    handler.chunk(b"half")


def short(handler: Handler) -> None:
    handler.begin(200, "audio/wav", Content_Length="100")
    handler.wfile.write(b"half")


@pytest.mark.parametrize("answer", [cut_chunk, no_last_chunk, short])
def test_half_a_speech_leaves_no_file_and_an_older_one_as_it_was(
    app: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: Callable[[Handler], None]
) -> None:
    app.answer = answer
    older = tmp_path / "older.wav"
    older.write_bytes(b"older")
    for name in ("new.wav", "older.wav"):
        assert run(app, "-o", str(tmp_path / name)) == 1
        assert "The speech ended early" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [older]
    assert older.read_bytes() == b"older"


def test_a_link_stays_a_link(app: Server, tmp_path: Path) -> None:
    (tmp_path / "target.wav").write_bytes(b"older")
    (tmp_path / "link.wav").symlink_to("target.wav")
    assert run(app, "-o", str(tmp_path / "link.wav")) == 0
    assert (tmp_path / "link.wav").is_symlink()
    assert (tmp_path / "target.wav").read_bytes() == SPEECH


@pytest.mark.parametrize("output", ["missing/out.wav", "/dev/full", "."])
def test_a_file_that_cannot_be_written_is_said(
    app: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    assert run(app, "-o", str(tmp_path / output)) == 1
    assert "The speech cannot be saved" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (refusal(404, {"error": {"message": "No voice is called 'Ada'.", "type": "x", "code": None}}), "No voice is c"),
        (refusal(401, {"error": {"message": "Send a key. / 请发送密钥。"}}), "Send a key.\n"),
        (refusal(503, {"error": "Shutting down"}), "Shutting down\n"),
        (refusal(404, {"detail": "Not Found"}), "No app with a speech API answers"),
        (refusal(405, b"<html>"), "No app with a speech API answers"),
        (refusal(502, b"<html>"), "502 Bad Gateway"),
        (refusal(500, {"error": {}}), "500 Internal Server Error"),
        (refusal(200, b"<html>", "text/html"), "another program answers"),
        (refusal(200, {"ok": True}), "another program answers"),
        (lambda handler: handler.wfile.write(b"SSH-2.0\r\n"), "No app with a speech API answers"),
        (lambda handler: None, "No app with a speech API answers"),
    ],
)
def test_a_refusal_is_one_sentence(
    app: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    answer: Callable[[Handler], None],
    said: str,
) -> None:
    app.answer = answer
    assert run(app, "-o", str(tmp_path / "out.wav")) == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_app_that_does_not_run_is_said_in_the_language_of_the_locale(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    for url in ("http://127.0.0.1:9", "http://["):
        assert command_line.main(["speak", "Hi", "--voice", "Ada", "-o", "-", "--url", url]) == 1
        assert "没有提供语音接口的应用" in capsys.readouterr().err


def test_its_formats_are_those_of_the_app() -> None:
    assert set(speak.FORMATS) == set(get_args(AudioFormat)) == set(MEDIA_TYPES)
