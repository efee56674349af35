"""Responses to requests that middleware refuses, and the static files that it never refuses."""

from __future__ import annotations

import html

from gradio.route_utils import API_PREFIX
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import Scope

from ..shared.language import preferred

_STATIC_FOLDERS = ("/assets/", "/static/", "/svelte/", "/docs/static/")
_STATIC_FILES = {"/theme.css", f"{API_PREFIX}/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"}
_PAGE = """<!doctype html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{code}</title>
<body style="font: 16px/1.6 system-ui, sans-serif; max-width: 40em; margin: 3em auto; padding: 0 1em">
<p role="alert">⚠️ {sentence}</p>
"""


def is_static(scope: Scope) -> bool:
    """Whether an HTTP request reads a static file (script, style, font).

    Browsers send ``Origin`` for scripts and fonts too, as for requests that make changes.
    """
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in _STATIC_FILES or path.startswith(_STATIC_FOLDERS))


def refused(request: HTTPConnection, code: int, zh: str, en: str) -> Response:
    """Returns the sentence as an HTML page for browsers, as plain text for programs."""
    sentence = preferred(request.headers.get("accept-language"))(zh, en)
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(_PAGE.format(code=code, sentence=html.escape(sentence)), code)
    return PlainTextResponse(sentence, code)
