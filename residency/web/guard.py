"""Who may change things: people on this machine, those who have signed in to the page, and those who know the token.

Looking is open to everybody who reaches the port; if the page asks for a password, to the same people. A page of
another site in somebody's browser may change nothing, whoever has opened it.
"""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import SplitResult, urlsplit

from starlette.requests import HTTPConnection

from ..errors import NotAllowed

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
        if self._token is not None and hmac.compare_digest(_token_sent(request).encode(), self._token):
            return
        if not from_another_site(request) and (user or (self._trust_local and _is_local(request))):
            return
        raise NotAllowed

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
    stands in headers that anybody can write.
    """
    if any(header in _PASSED_ON or header.startswith("x-forwarded-") for header in request.headers):
        return False
    origin = request.headers.get("origin")
    if origin is not None and not _is_loopback(_split(origin).hostname):
        return False  # the page came through a proxy that says nothing in headers
    hostname = _split(f"//{request.headers.get('host', '')}").hostname
    named = _is_loopback(hostname) or _is_address(hostname)
    return named and request.client is not None and _is_loopback(request.client.host)


def _is_loopback(host: str | None) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(str(host)).is_loopback)


def _is_address(host: str | None) -> bool:
    try:
        ipaddress.ip_address(str(host))
    except ValueError:
        return False
    return True


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
