"""Requests that no page and no client sends: each is answered with a code below 500, and leaves no traceback."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from app_process import ROOT, ForkedApp, RunningApp, wait_until
from raw_http import Answer, ask

API = "/gradio_api"
JSON, FORM, PARTS = (
    f"Content-Type: {kind}"
    for kind in ("application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b")
)
INSTALLATION = (str(ROOT), "site-packages", "/lib/python")


def part(head: str, content: bytes = b"x") -> bytes:
    """A form of one part."""
    return f"--b\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n--b--\r\n"


def call(**more: Any) -> bytes:
    return json.dumps({"data": [], "fn_index": 0, "session_hash": "s", **more}).encode()


def component(**more: Any) -> bytes:
    return json.dumps({"data": 1, "component_id": 1, "session_hash": "s", "fn_name": "x", **more}).encode()


def file(path: Any, **more: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    folder, gates = (tmp_path_factory.mktemp(name) for name in ("recordings", "gates"))
    with ForkedApp(folder, "--enable-gpu-management", "--simulate-gpu", "48GB", gates=gates) as app:
        yield app
        app.stop()
    assert_well(app)


@pytest.fixture
def app(shared: RunningApp) -> Iterator[RunningApp]:
    shared.forget_log()
    yield shared
    assert ask(shared.port, "/healthz").status == 200
    assert_well(shared)


def assert_well(app: RunningApp) -> None:
    assert "Traceback" not in app.log
    assert " ERROR " not in app.log


def refused(answer: Answer, *codes: int) -> str:
    assert answer.status in codes, answer
    assert not [path for path in INSTALLATION if path in answer.text], answer.text
    return answer.text


class TestUnusedRoutes:
    @pytest.mark.parametrize(
        "path",
        ["/monitoring", "/monitoring/", "/monitoring/summary", "/monitoring/x", f"{API}/dev/reload", f"{API}/proxy=",
         f"{API}/proxy=%00", f"{API}/proxy=https://a.hf.space/", f"{API}/file=https://example.org/a.wav",
         f"{API}/file=HTTP://127.0.0.1:9/", f"{API}/custom_component/a/client/b/c", f"{API}/deep_link?session_hash=s",
         f"{API}/runs", f"{API}/run-history/buckets", f"{API}/vibe-code/", f"{API}/stream/a/b/1/playlist.m3u8",
         "/svelte/x", "/pwa_icon/5", "/login", "/logout", "/static/%00", "/docs/static/%00"],
    )  # fmt: skip
    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_they_are_not_found(self, app: RunningApp, path: str, method: str) -> None:
        refused(ask(app.port, path, method=method), 404)

    @pytest.mark.parametrize("path", ["component_server", "component_server/", "process_recording", "vibe-edit",
                                      "stream/x", "stream/x/close", "undo-vibe-edit",
                                      "run-history/connect"])  # fmt: skip
    @pytest.mark.parametrize(
        ("kind", "body"),
        [
            (JSON, component(component_id=9999)),
            (JSON, component(component_id="x")),
            (PARTS, part('name="a"')),
            (PARTS, b"x"),
        ],
    )
    def test_nor_is_anything_sent_to_them(self, app: RunningApp, path: str, kind: str, body: bytes) -> None:
        refused(ask(app.port, f"{API}/{path}", kind, method="POST", body=body), 404)

    def test_the_page_has_what_it_needs(self, app: RunningApp) -> None:
        page = ask(app.port, "/").text
        for path in re.findall(r'(?:src|href)="\.?/?((?:assets|static|theme)[^"]+)"', page):
            assert ask(app.port, f"/{path}").status == 200, path


class TestSlashes:
    @pytest.mark.parametrize("path", ["/gpu/status/", "/gpu/release/", "/gpu/configure/", "/docs/", "/docs/static",
                                      f"{API}/queue/join/", f"{API}/upload/", "/static", "/config//"])  # fmt: skip
    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_they_lead_nowhere(self, app: RunningApp, path: str, method: str) -> None:
        answer = ask(app.port, path, method=method)
        refused(answer, 404, 405)
        assert "location" not in answer.headers


class TestUploads:
    @pytest.mark.parametrize(
        "body",
        [
            part('name="files"'),
            part('filename="a"'),
            part('name="other"; filename="a"'),
            b"",
            b"x",
            part('name="files"; filename="a'),
        ],
    )
    @pytest.mark.parametrize("query", ["", "?upload_id=x"])
    def test_one_without_a_name_is_refused(self, app: RunningApp, body: bytes, query: str) -> None:
        refused(ask(app.port, f"{API}/upload{query}", PARTS, method="POST", body=body), 200, 400)

    def test_it_is_said_what_is_missing(self, app: RunningApp) -> None:
        body = part('name="files"')
        for language, words in (("en", "in a form with a file name"), ("zh", "带文件名的表单")):
            answer = ask(app.port, f"{API}/upload", PARTS, f"Accept-Language: {language}", method="POST", body=body)
            assert words in json.loads(refused(answer, 400))["detail"]

    @pytest.mark.parametrize("kind", [JSON, FORM, PARTS])
    @pytest.mark.parametrize("path", ["/gpu/release", f"{API}/upload", f"{API}/queue/join", f"{API}/call/clone",
                                      "/login", f"{API}/run/clone", f"{API}/component_server"])  # fmt: skip
    def test_bodies_are_given_up_without_a_word(self, app: RunningApp, path: str, kind: str) -> None:
        with socket.create_connection(("127.0.0.1", app.port), timeout=60) as line:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n{kind}\r\n\r\n"
            line.sendall(head.encode() + part('name="files"; filename="a.wav"')[:-9])
        assert ask(app.port, "/gpu/status").status == 200


class TestCalls:
    BODIES = (
        b"", b"{", b"NaN", b"[NaN]", b'{"data": NaN}', b"\xff", b"[" * 20000, b'{"\\ud800": 1}', b'"\\ud800"',
        call(data=None), call(fn_index=9999), call(fn_index=-1), call(fn_index="x"), call(fn_index=10**30),
        call(session_hash=""), call(session_hash=["s"]), call(trigger_id="x"), call(trigger_id=99999),
        call(event_id="x"), call(data=[1] * 99), call(batched=True),
    )  # fmt: skip

    @pytest.mark.parametrize("path", ["queue/join", "run/clone", "run/nothing", "api/clone", "call/clone",
                                      "call/nothing", "call/v2/clone", "call/v2/nothing", "cancel",
                                      "reset"])  # fmt: skip
    def test_a_garbled_one_is_refused_and_heard_of_no_more(self, app: RunningApp, path: str) -> None:
        for body in self.BODIES:
            said = refused(ask(app.port, f"{API}/{path}", JSON, method="POST", body=body), 200, 400, 404, 405, 422, 503)
            if event := re.search(r'"event_id": ?"(\w+)"', said):
                refused(ask(app.port, f"{API}/call/clone/{event[1]}"), 200)

    @pytest.mark.parametrize("path", ["queue/data?session_hash=nobody", "call/clone/nothing", "call/nothing/nothing"])
    def test_a_stream_of_nobody_ends(self, app: RunningApp, path: str) -> None:
        answer = ask(app.port, f"{API}/{path}")
        assert answer.status in (200, 404)
        assert answer.text.endswith("0\r\n\r\n")

    @pytest.mark.parametrize(
        "path",
        ["app.py", "residency/web/page.py", "../../etc/passwd", "/etc/passwd", ".", "", "~", "\0", "x" * 5000, None, 5,
         "\ud800", "/no/such/file.wav", "/dev/zero", str(ROOT / "README.md"), str(ROOT)],
    )  # fmt: skip
    @pytest.mark.parametrize("way", ["run/clone", "call/clone", "queue/join"])
    def test_no_file_of_the_installation_is_named(self, app: RunningApp, way: str, path: Any) -> None:
        functions = json.loads(ask(app.port, "/config").text)["dependencies"]
        clone = next(each["id"] for each in functions if each["api_name"] == "clone")
        body = call(
            data=[file(path), "said", "to say"], fn_index=clone, session_hash=None if way == "call/clone" else "files"
        )
        answer = ask(app.port, f"{API}/{way}", JSON, method="POST", body=body)
        said = refused(answer, 200, 400)
        if answer.status == 200:
            line = (
                f"call/clone/{json.loads(said)['event_id']}" if way == "call/clone" else "queue/data?session_hash=files"
            )
            said = refused(ask(app.port, f"{API}/{line}"), 200)
        wordless = said.endswith("event: error\ndata: null\n\n\r\n0\r\n\r\n")  # as calls of Gradio 5 end
        assert wordless or re.search("input is invalid|upload it again", said)

    @pytest.mark.parametrize(("language", "words"), [("en", "The input is invalid"), ("zh", "输入无效")])
    def test_a_task_that_the_menu_does_not_have(self, app: RunningApp, language: str, words: str) -> None:
        page = json.loads(ask(app.port, "/config").text)
        menu = next(each["id"] for each in page["components"] if each["props"].get("elem_id") == "task")
        chosen = next(each["id"] for each in page["dependencies"] if each["inputs"][:1] == [menu])
        body = call(data=["no such task", None], fn_index=chosen)
        answer = ask(app.port, f"{API}/run/predict", JSON, f"Accept-Language: {language}", method="POST", body=body)
        assert words in json.loads(refused(answer, 400))["error"]

    def test_what_was_sent_is_not_sent_back(self, app: RunningApp) -> None:
        body = json.dumps({"secret": "x" * 10_000}).encode()
        answer = ask(app.port, f"{API}/cancel", JSON, method="POST", body=body)
        assert json.loads(refused(answer, 422))["detail"][0]["loc"] == ["body", "session_hash"]
        assert len(answer.text) < 1000


def test_errors_of_the_server_stay_in_its_log(tmp_path: Path) -> None:
    """Also with a Gradio that shows them to everybody."""
    prelude = """
from residency.web.server import gradio_routes
def around(app):
    async def failing(scope, receive, send):
        if scope.get("query_string") != b"fail":
            return await app(scope, receive, send)
        raise OSError("a disk has failed")
    return failing
gradio_routes.without = lambda also: around
"""
    with ForkedApp(tmp_path, prelude=prelude) as app:
        for path in ("/", "/gradio_api/login_check", "/no/such/page"):
            answer = ask(app.port, f"{path}?fail")
            assert (answer.status, answer.text) == (500, "Internal Server Error")
        assert wait_until(lambda: "a disk has failed" in app.log)
