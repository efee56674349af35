"""Decides which requests may make changes: from this machine, from signed-in users, or with the token.

All requests may read; if the page has a password, only these may. Requests that a browser sends for a page of another
site may not make changes, even if the user of that browser may.
"""

from __future__ import annotations

import hmac
from urllib.parse import SplitResult, urlsplit

from starlette.requests import HTTPConnection

from ...addresses import hostname, is_address, is_loopback
from ...errors import NotAllowed
from .rate_limit import Guesses

_PASSED_ON = frozenset({"forwarded", "via", "x-real-ip"})
"""Headers that proxies add to a request, in addition to ``X-Forwarded-...``."""

PUBLIC_HOST = "residency.public_host"
"""Key in the ASGI scope for the host (and port, if given) of ``--root-path``."""


class Permissions:
    """Permission checks. ``trust_local`` must be False behind a tunnel (``--share``), where all requests seem local.

    ``guesses`` counts wrong tokens, and the wrong keys of `ApiKeys`. Thread-safe.
    """

    def __init__(self, token: str | None = None, *, trust_local: bool = True) -> None:
        self._token = token.encode() if token else None
        self._trust_local = trust_local
        self.guesses = Guesses()

    def check(self, request: HTTPConnection, user: str | None = None) -> None:
        """Raises `NotAllowed` or `TooManyWrongKeys` unless the request may make changes; ``user`` has signed in."""
        if not self.allows(request, user):
            raise NotAllowed

    def allows(self, request: HTTPConnection, user: str | None = None) -> bool:
        """Whether the request may make changes; raises `TooManyWrongKeys`."""
        if not from_another_site(request) and (bool(user) or (self._trust_local and _is_local(request))):
            return True
        return self.has_token and self.passes(request, self.knows_token(request))

    @property
    def has_token(self) -> bool:
        return self._token is not None

    def passes(self, request: HTTPConnection, right: bool) -> bool:
        """Returns ``right``, and counts what the request sends if it is wrong; raises `TooManyWrongKeys`."""
        if sent := token_sent(request):
            self.guesses.check(request, sent, right)
        return right

    def knows_token(self, request: HTTPConnection) -> bool:
        """Whether the request has the token; False if the server has none."""
        return self._token is not None and hmac.compare_digest(token_sent(request).encode(), self._token)


def token_sent(request: HTTPConnection) -> str:
    """Returns the token of the request's headers; empty without one."""
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    return credentials.strip() if scheme.lower() == "bearer" else request.headers.get("x-control-token", "")


def _is_local(request: HTTPConnection) -> bool:
    """Whether the request is from this machine, under a name or address of it (against DNS rebinding).

    Requests through a proxy on this machine are not local: their headers about the client can be forged. A proxy that
    adds no header (nginx by default) is detected by HTTP/1.0, which few programs use today.
    """
    if any(header in _PASSED_ON or header.startswith("x-forwarded-") for header in request.headers):
        return False
    if request.scope.get("http_version") == "1.0":
        return False
    origin = request.headers.get("origin")
    if origin is not None and not is_loopback(_split(origin).hostname):
        return False  # the page was loaded through a proxy that adds no headers
    name = hostname(request.headers.get("host", ""))
    return (is_loopback(name) or is_address(name)) and request.client is not None and is_loopback(request.client.host)


def from_another_site(request: HTTPConnection) -> bool:
    """Whether a browser sends the request for a page of another site. Its ``Origin`` is sent with changes."""
    return from_this_site(request, "origin") is False


def from_this_site(request: HTTPConnection, header: str) -> bool | None:
    """Whether a browser sends the request for a page of this site, or for a typed address; None if unknown.

    Browsers send ``Sec-Fetch-Site`` over https and on localhost; otherwise ``header`` has the page's address. Proxies
    send their public host in ``X-Forwarded-Host``, which no page can set for another site.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    address = request.headers.get(header)
    if not address:
        return None
    passed_on = request.headers.get("x-forwarded-host", "").partition(",")[0].strip()
    ours = (request.headers.get("host", ""), passed_on, request.scope.get(PUBLIC_HOST))
    return (_split(address).netloc or address) in ours


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:  # not a URL
        return urlsplit("")
