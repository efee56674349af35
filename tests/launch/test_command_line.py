"""``python -m gpu_manager`` against a small server that answers as the app does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from fakes import Gate, Workshop
from local_server import serving

from gpu_manager import GPUResourceManager
from residency.launch import command_line


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")


@pytest.fixture
def app(manager: GPUResourceManager) -> Iterator[HTTPServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if server.garbage:
                self.wfile.write(server.garbage)
            else:
                self.answer(200, manager.status())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.seen.append((self.path, body, self.headers.get("Authorization")))
            self.answer(*server.next_answer)

        def answer(self, code: int, content: object) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []
    server.garbage = b""
    server.next_answer = (200, manager.status())
    with serving(server):
        yield server


def run(app: HTTPServer, *arguments: str) -> int:
    return command_line.main([*arguments, "--url", f"http://127.0.0.1:{app.server_port}/"])


def test_status_prints_a_table(app: HTTPServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, "status") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Simulated GPU")
    assert lines[2].split() == ["tts", "released", "0", "B", "0", "B", "-", "0", "-"]


def test_status_of_one_model_is_that_of_no_other(
    app: HTTPServer, manager: GPUResourceManager, capsys: pytest.CaptureFixture[str]
) -> None:
    manager.register("asr", object)
    assert run(app, "status", "asr") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["asr"]
    assert run(app, "status", "asr", "--json") == 0
    assert list(json.loads(capsys.readouterr().out)["models"]) == ["asr"]
    assert run(app, "status", "nosuch") == 1
    said = capsys.readouterr()
    assert (said.out, "'nosuch'; known: tts, asr" in said.err) == ("", True)


def test_the_table_tells_what_comes_next(
    app: HTTPServer, manager: GPUResourceManager, capsys: pytest.CaptureFixture[str]
) -> None:
    manager.configure("tts", keep_warm=90)
    with manager.lease("tts"):
        manager.release("tts")
        run(app, "status")
        assert "release after the request" in capsys.readouterr().out
    with manager.lease("tts"):
        pass
    run(app, "status")
    assert "cpu in 90 s" in capsys.readouterr().out


def test_a_release_during_a_load_without_a_request_follows_the_load(
    app: HTTPServer, manager: GPUResourceManager, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop.gate = gate = Gate()
    manager.warm("tts")
    gate.wait_for_arrival()
    assert manager.release("tts") is False
    run(app, "status")
    assert "release after the load" in capsys.readouterr().out
    gate.open()


@pytest.mark.parametrize(
    ("locale", "held"),
    [
        ("C.UTF-8", r"tts: held for .* s by .*test_command_line.py:\d+.* \(thread MainThread\)$"),
        ("zh_CN.UTF-8", r"tts: .*test_command_line.py:\d+.*（线程 MainThread）已占用 .* 秒$"),
    ],
)
def test_the_table_tells_who_uses_a_model_and_since_when(
    app: HTTPServer,
    manager: GPUResourceManager,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    locale: str,
    held: str,
) -> None:
    monkeypatch.setenv("LC_ALL", locale)
    with manager.lease("tts"):
        run(app, "status")
    said = capsys.readouterr().out
    assert re.search(held, said, re.MULTILINE)
    assert said.startswith("Simulated GPU" if locale == "C.UTF-8" else "模拟 GPU")
    assert " / " not in said
    run(app, "status")
    assert "held for" not in capsys.readouterr().out


def test_the_table_tells_what_is_held_outside_the_books(manager: GPUResourceManager) -> None:
    assert "unmanaged" not in command_line.table(manager.status())
    status = manager.status()
    model = status["models"]["tts"]
    model["outside_processes"] = [
        {"pid": 7, "command": "app.py", "device_bytes": 50 << 20, "host_bytes": None},
        {"pid": 8, "command": "python worker.py", "device_bytes": 50 << 20, "host_bytes": 100 << 20},
    ]
    held = "200 MB of unmanaged memory (pid 7 app.py, pid 8 python worker.py)"
    released = "The model was released, but the memory is still in use: end that process"
    assert f"tts: {held}. {released} / " in command_line.table(status)
    held_zh = "未受管理的内存 200 MB（pid 7 app.py, pid 8 python worker.py）"
    assert f"{held_zh}。模型已释放，仍在占用" in command_line.table(status)
    model["state"] = "cpu"
    assert f"tts: {held}. Release the model to free it / 未受管理的内存 200 MB" in command_line.table(status)


def test_the_status_of_an_older_app_is_shown_too(manager: GPUResourceManager) -> None:
    status = manager.status()
    for key in ("holder", "outside_bytes", "outside_processes"):
        del status["models"]["tts"][key]
    assert "tts" in command_line.table(status)


def test_sizes_are_in_the_unit_of_the_page(manager: GPUResourceManager) -> None:
    status = manager.status()
    status["models"]["tts"]["device_bytes"] = 25 << 19
    assert "12.5 MB" in command_line.table(status)


def test_json_prints_the_whole_status(app: HTTPServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, "status", "--json") == 0
    assert json.loads(capsys.readouterr().out)["models"]["tts"]["state"] == "released"


def test_commands_name_their_model_and_send_the_token(app: HTTPServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, "release", "tts", "--token", "secret") == 0
    assert run(app, "offload") == 0
    assert app.seen == [("/gpu/release", {"model": "tts"}, "Bearer secret"), ("/gpu/offload", {}, None)]
    app.next_answer = (202, app.next_answer[1])
    assert run(app, "warm") == 0
    assert capsys.readouterr().err == "The move to the GPU has begun\n"
    assert run(app, "offload") == 0
    assert capsys.readouterr().err == "The operation follows the running request or load\n"


def test_how_long_models_stay_is_changed(app: HTTPServer) -> None:
    assert run(app, "configure", "tts", "--keep-warm", "auto", "--idle-timeout", "1h") == 0
    assert app.seen == [("/gpu/configure", {"model": "tts", "keep_warm": "auto", "idle_timeout": "1h"}, None)]


@pytest.mark.parametrize(
    "arguments", [["configure"], ["release", "--keep-warm", "5"], ["status", "--idle-timeout", "5"]]
)
def test_times_go_with_configure(app: HTTPServer, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        run(app, *arguments)
    assert app.seen == []


def test_a_refusal_is_printed_and_fails(app: HTTPServer, capsys: pytest.CaptureFixture[str]) -> None:
    app.next_answer = (404, {"error": "No model is called 'llm'"})
    assert run(app, "release", "llm") == 1
    assert capsys.readouterr().err == "No model is called 'llm'\n"


def test_a_proxy_is_not_asked_for_an_app_on_this_machine(app: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert run(app, "status") == 0


@pytest.mark.parametrize("token", ["秘密", "s3cret\x07", "s3cret\nX-More: 1"])
@pytest.mark.parametrize("by", ["flag", "environment"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(
    app: HTTPServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, token: str, by: str
) -> None:
    if by == "environment":
        monkeypatch.setenv("GPU_CONTROL_TOKEN", token)
    with pytest.raises(SystemExit):
        run(app, "release", *(["--token", token] if by == "flag" else []))
    said = capsys.readouterr().err
    assert "--token" in said
    assert token[:6] not in said
    assert app.seen == []


def test_a_token_from_a_file_may_end_in_a_new_line(app: HTTPServer) -> None:
    assert run(app, "release", "--token", " secret\n") == 0
    assert app.seen == [("/gpu/release", {}, "Bearer secret")]


@pytest.mark.parametrize("content", [{"status": "ok"}, [1], "text", {"models": {}}])
def test_another_server_is_no_app(app: HTTPServer, capsys: pytest.CaptureFixture[str], content: object) -> None:
    app.next_answer = (200, content)
    assert run(app, "release") == 1
    assert "start one, or give --url" in capsys.readouterr().err


@pytest.mark.parametrize(
    "garbage", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{", b"\xff\r\n\r\n"]
)
def test_what_is_no_http_is_no_app(app: HTTPServer, capsys: pytest.CaptureFixture[str], garbage: bytes) -> None:
    app.garbage = garbage
    assert run(app, "status") == 1
    assert re.fullmatch(r".*start one, or give --url\n", capsys.readouterr().err)


@pytest.mark.parametrize("code", [404, 405])
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LANG": "C.UTF-8"}, "There is no GPU management"),
        ({"LANG": "zh_CN.UTF-8"}, "没有 GPU 管理"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, "There is no GPU management"),
        ({}, "There is no GPU management"),
    ],
)
def test_an_app_without_management_is_said_to_be_one_in_the_language_of_the_locale(
    app: HTTPServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    variables: dict[str, str],
    expected: str,
) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    app.next_answer = (code, {"detail": "Not Found"})
    assert run(app, "release") == 1
    said = capsys.readouterr().err
    assert "--enable-gpu-management" in said
    assert expected in said
    assert " / " not in said


def test_an_address_needs_no_scheme(app: HTTPServer) -> None:
    assert command_line.main(["status", "--url", f"127.0.0.1:{app.server_port}"]) == 0


def test_no_app_there_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["status", "--url", "http://127.0.0.1:9"]) == 1
    assert "start one, or give --url" in capsys.readouterr().err
