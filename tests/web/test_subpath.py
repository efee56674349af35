"""Requests under a root path, whether or not a proxy has removed it; refusals for people and programs."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from residency.web.server.heartbeats import Heartbeats
from residency.web.server.layers import beneath
from residency.web.server.middleware import RequestMiddleware


def client(root_path: str, folder: object = "/nonexistent") -> TestClient:
    async def told(request: Request) -> JSONResponse:
        return JSONResponse([request.scope["path"], request.scope["root_path"]])

    traffic = RequestMiddleware(folder, Heartbeats(lambda session: None, lambda session: None))
    return TestClient(
        Starlette(
            routes=[Route("/{rest:path}", told, methods=["GET", "POST"])],
            middleware=[Middleware(beneath(root_path)), Middleware(traffic.around)],
        ),
        follow_redirects=False,
    )


@pytest.mark.parametrize("root_path", ["/tts", "https://tts.example/tts"])
@pytest.mark.parametrize("path", ["/gpu/status", "/tts/gpu/status"])
def test_behind_it_there_is_no_difference(root_path: str, path: str) -> None:
    assert client(root_path).get(path).json() == ["/gpu/status", "/tts"]


@pytest.mark.parametrize("path", ["/tts/tts", "/tts/tts/", "/tts/tts/login", "/tts/tts/tts/gradio_api/heartbeat/x"])
def test_a_repeated_prefix_leads_nowhere(path: str) -> None:
    """Starlette would remove it a second time, after the middleware that compares paths."""
    assert client("/tts").get(path).status_code == 404


def test_only_whole_segments_are_removed() -> None:
    assert client("/tts").get("/ttsx").json() == ["/ttsx", "/tts"]
    assert client("").get("/tts/x").json() == ["/tts/x", ""]


def test_the_page_is_a_folder_wherever_people_think_the_server_is() -> None:
    answer = client("/tts").get("/tts?__theme=dark", headers={"Host": "evil.example"})
    assert (answer.status_code, answer.headers["location"]) == (307, "/tts/?__theme=dark")


def test_the_host_of_the_whole_address_is_this_site() -> None:
    theirs = {"Host": "127.0.0.1:7860", "Origin": "https://tts.example:8443"}
    assert client("https://tts.example:8443/tts").post("/run", headers=theirs).status_code == 200
    assert client("https://other.example").post("/run", headers=theirs).status_code == 403
    assert client("/tts").post("/run", headers={"Host": "", "Origin": ""}).status_code == 200


STRANGE = {"Host": "127.0.0.1:7860", "Origin": "https://tts.example"}


@pytest.mark.parametrize("path", ["/assets/index.js", "/static/fonts/a.woff2", "/theme.css", "/docs/static/a.css"])
def test_files_that_are_the_same_for_everybody_are_never_refused(path: str) -> None:
    assert client("").get(path, headers=STRANGE).status_code == 200
    assert client("").post(path, headers=STRANGE).status_code == 403


@pytest.mark.parametrize("path", ["/config", "/gpu/status", "/gradio_api/file=/assets/x", "/assetsx"])
def test_what_reveals_something_is(path: str) -> None:
    assert client("").get(path, headers=STRANGE).status_code == 403


def test_a_refusal_is_a_page_for_people_in_their_language() -> None:
    chinese = client("").post("/run", headers={**STRANGE, "Accept": "text/html,*/*", "Accept-Language": "zh-CN"})
    assert chinese.headers["content-type"].startswith("text/html")
    assert "请让反向代理" in chinese.text
    assert "proxy_set_header Host $http_host" in chinese.text
    program = client("").post("/run", headers=STRANGE)
    assert program.headers["content-type"].startswith("text/plain")
    assert "--root-path" in program.text
    assert "反向代理" in program.text
