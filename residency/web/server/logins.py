"""Limits the rate of wrong passwords, and prevents other sites from signing users out."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable

import anyio
from gradio.utils import LRUCache
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..shared.language import preferred
from .layers import http_layer
from .permissions import from_this_site
from .rate_limit import FAILURES, ONE_EVERY_S, RateLimit, network

_ALL_FAILURES, _ONE_OF_ALL_EVERY_S = 50, 0.25
_FAILED_AFTER_S = 0.5
_BROWSER_AGE_S = 30 * 24 * 3600
_BROWSERS = 10_000
_ENOUGH = (
    "密码错误次数过多：请等待 {seconds} 秒后重试。",
    "Too many wrong passwords from here: wait {seconds} s, then try again.",
)
_LEAVING = """<!DOCTYPE html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><p>{sentence}</p><form method="post"><button>{title}</button></form>"""


class Logins:
    """`around` is the layer for a page with a password. For the thread of the server's loop.

    Counts wrong passwords per address (IPv6: per network) and in total. A cookie identifies browsers with an earlier
    login, which have limits of their own: guesses from other browsers, even at the same address, do not lock them out.
    ``sign_out`` ends the login of a request, and returns the names of its cookies.
    """

    def __init__(
        self, sign_out: Callable[[HTTPConnection], list[str]], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._sign_out = sign_out
        self._now = now
        self._known_browsers: LRUCache[str, None] = LRUCache(_BROWSERS)
        self._each = RateLimit(FAILURES, ONE_EVERY_S)
        self._all = RateLimit(_ALL_FAILURES, _ONE_OF_ALL_EVERY_S)

    @http_layer
    async def around(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/")
        if path == "/login" and scope["method"] == "POST":
            await self._sign_in(app, scope, receive, send)
        elif path == "/logout":
            await self._leave(HTTPConnection(scope), scope["method"])(scope, receive, send)
        else:
            await app(scope, receive, send)

    async def _sign_in(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        request = HTTPConnection(scope)
        cookie = f"known-browser-{(scope.get('server') or ('', ''))[1]}"
        browser = request.cookies.get(cookie, "")
        now_s = self._now()
        # Known browsers do not count towards the overall limit: they are as few as the users.
        known = browser in self._known_browsers
        counts = [(self._each, browser)] if known else [(self._each, network(request)), (self._all, "")]
        wait_s = max(pace.wait_s(key, now_s) for pace, key in counts)
        if wait_s > 0:
            seconds = math.ceil(wait_s)
            sentence = preferred(request.headers.get("accept-language"))(*_ENOUGH).format(seconds=seconds)
            return await PlainTextResponse(sentence, 429, {"Retry-After": str(seconds)})(scope, receive, send)
        for pace, key in counts:  # before the result, since many requests may run concurrently
            pace.take(key, now_s)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] == 400:
                    await anyio.sleep(_FAILED_AFTER_S)
                else:
                    for pace, key in counts:
                        pace.give_back(key)
                if message["status"] == 200:
                    MutableHeaders(scope=message).append("Set-Cookie", self._known_from_now_on(cookie))
            await send(message)

        await app(scope, receive, noted)

    def _known_from_now_on(self, cookie: str) -> str:
        browser = secrets.token_urlsafe(32)
        self._known_browsers[browser] = None
        return f"{cookie}={browser}; Max-Age={_BROWSER_AGE_S}; Path=/; HttpOnly; SameSite=Strict"

    def _leave(self, request: HTTPConnection, method: str) -> Response:
        if method not in ("GET", "POST"):
            return PlainTextResponse("Method Not Allowed", 405)
        if method == "GET" and not from_this_site(request, "referer"):
            localize = preferred(request.headers.get("accept-language"))
            title, sentence = localize("退出登录", "Sign out"), localize("是否退出登录？", "Do you want to sign out?")
            return HTMLResponse(_LEAVING.format(title=title, sentence=sentence), 403)
        answer = RedirectResponse("../" if request.url.path.endswith("/") else "./", 302)
        for cookie in self._sign_out(request):
            answer.delete_cookie(cookie)
        return answer
