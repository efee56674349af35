"""The page's HTML is changed for names of Chinese that Gradio does not know, and nothing else is."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from residency.web.server import locale

HTML = "<html><head><title>page</title></head></html>"


async def page(request: Request) -> Response:
    if "json" in request.query_params:
        return JSONResponse({"html": HTML})
    return HTMLResponse(HTML)


@pytest.fixture
def client() -> TestClient:
    routes = [Route("/", page), Route("/other", page)]
    return TestClient(Starlette(routes=routes, middleware=[Middleware(locale.around)]))


def test_the_script_comes_before_everything_else(client: TestClient) -> None:
    answer = client.get("/")
    before, _, after = answer.text.partition("</script>")
    assert before.startswith("<html><head><script>")
    assert "zh-TW" in before
    assert after == "<title>page</title></head></html>"
    assert int(answer.headers["content-length"]) == len(answer.content)


@pytest.mark.parametrize("path", ["/other", "/?json", "/missing"])
def test_everything_else_is_left_alone(client: TestClient, path: str) -> None:
    assert "script" not in client.get(path).text
