"""Decides which requests may change things: from this machine, from signed-in users, or with the token.

Every request that reaches the port may read; if the page has a password, only these requests may. A request that a
page of another site sends from a browser may change nothing, even if the user of that browser may.
"""

from __future__ import annotations

import hmac
from urllib.parse import SplitResult, urlsplit

from starlette.requests import HTTPConnection

from ...addresses import hostname, is_address, is_loopback
from ...errors import NotAllowed

_PASSED_ON = frozenset({"forwarded", "via", "x-real-ip"})
"""Beside ``X-Forwarded-...``: what proxies add to a request."""

PUBLIC_HOST = "residency.public_host"
"""In the ASGI scope: the host, and the port if it is named, of the address that ``--root-path`` gives."""


class Permissions:
    """Checks requests. Behind a tunnel (``--share``) all requests seem to be local: then ``trust_local`` is False."""

    def __init__(self, token: str | None = None, *, trust_local: bool = True) -> None:
        self._token = token.encode() if token else None
        self._trust_local = trust_local

    def check(self, request: HTTPConnection, user: str | None = None) -> None:
        """Raise `NotAllowed` unless the request may change things; ``user`` is the name of a signed-in user."""
        if self.knows_token(request):
            return
        if not from_another_site(request) and (user or (self._trust_local and _is_local(request))):
            return
        raise NotAllowed

    def knows_token(self, request: HTTPConnection) -> bool:
        """Whether the request carries the token; False if the server has none."""
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
    """Whether the request is from this machine and names it: another site can lead its own name here (DNS rebinding).

    A request that a proxy on this machine passes on is not local: its sender may be anywhere, and the headers that tell
    the sender can be forged. A proxy that adds no header (nginx by default) passes on the name that it was called by,
    or its own name for this server; it is recognised by HTTP/1.0, which few programs use today.
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
    """Whether a browser sends the request for a page of another site.

    Browsers tell it in ``Sec-Fetch-Site`` over https and on localhost; otherwise ``Origin`` names the site of requests
    that change things. A proxy names its public host in ``X-Forwarded-Host``, which no page can set for another site.
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
