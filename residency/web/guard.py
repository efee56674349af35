"""Who may change things: people on this machine, those who have signed in to the page, and those who know the token.

Looking is open to everybody who reaches the port; if the page asks for a password, to the same people. A page of
another site in somebody's browser may change nothing, whoever has opened it.
"""

from __future__ import annotations

import hmac
from urllib.parse import SplitResult, urlsplit

from starlette.requests import HTTPConnection

from ..errors import NotAllowed
from .addresses import hostname, is_address, is_loopback

_PASSED_ON = frozenset({"forwarded", "via", "x-real-ip"})
"""Beside ``X-Forwarded-...``: what proxies add to a request."""

PUBLIC_HOST = "residency.public_host"
"""In the ASGI scope: the host, and the port if it is named, of the address that ``--root-path`` gives."""


class Guard:
    """Knows the token. Behind a tunnel (``--share``) everybody looks local: then ``trust_local`` is False."""

    def __init__(self, token: str | None = None, *, trust_local: bool = True) -> None:
        self._token = token.encode() if token else None
        self._trust_local = trust_local

    def check(self, request: HTTPConnection, user: str | None = None) -> None:
        """`NotAllowed` unless who sends this may change things; ``user`` is the name they have signed in with."""
        if self.knows_token(request):
            return
        if not from_another_site(request) and (user or (self._trust_local and _is_local(request))):
            return
        raise NotAllowed

    def knows_token(self, request: HTTPConnection) -> bool:
        """Whether the token was sent; False if there is none."""
        return self._token is not None and hmac.compare_digest(_token_sent(request).encode(), self._token)

    def allows(self, request: HTTPConnection, user: str | None = None) -> bool:
        """Whether `check` raises nothing."""
        try:
            self.check(request, user)
        except NotAllowed:
            return False
        return True


def _token_sent(request: HTTPConnection) -> str:
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    return credentials.strip() if scheme.lower() == "bearer" else request.headers.get("x-control-token", "")


def _is_local(request: HTTPConnection) -> bool:
    """From this machine, under a name of it: a name of somebody else's can be rebound to this machine.

    What a proxy on this machine passes on is not: it comes from wherever the proxy can be reached, and where that is
    stands in headers that anybody can write. One that adds no header (nginx, unless it is told to) passes on the name
    that it was called by, or its own for this server; then HTTP/1.0 gives it away, which few others speak today.
    """
    if any(header in _PASSED_ON or header.startswith("x-forwarded-") for header in request.headers):
        return False
    if request.scope.get("http_version") == "1.0":
        return False
    origin = request.headers.get("origin")
    if origin is not None and not is_loopback(_split(origin).hostname):
        return False  # the page came through a proxy that says nothing in headers
    name = hostname(request.headers.get("host", ""))
    return (is_loopback(name) or is_address(name)) and request.client is not None and is_loopback(request.client.host)


def from_another_site(request: HTTPConnection) -> bool:
    """Whether a browser sends this for a page of somebody else.

    Browsers say so themselves over https and on localhost; else they name the origin of whatever changes things.
    Proxies may tell in a header of its own under which name people know them; no page can write that for another site.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = request.headers.get("origin")
    passed_on = request.headers.get("x-forwarded-host", "").partition(",")[0].strip()
    ours = (request.headers.get("host", ""), passed_on, request.scope.get(PUBLIC_HOST))
    return origin is not None and (_split(origin).netloc or origin) not in ours


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:  # no address at all
        return urlsplit("")
