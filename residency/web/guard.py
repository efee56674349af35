"""Who may change things: people on this machine, those who have signed in to the page, and those who know the token.

Looking is open to everybody who reaches the port. A page of another site in somebody's browser may change nothing,
whoever has opened it.
"""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import SplitResult, urlsplit

from starlette.requests import HTTPConnection

from ..errors import NotAllowed


class Guard:
    """Knows the token. Behind a tunnel (``--share``) everybody looks local: then ``trust_local`` is False."""

    def __init__(self, token: str | None = None, *, trust_local: bool = True) -> None:
        self._token = token.encode() if token else None
        self._trust_local = trust_local

    def check(self, request: HTTPConnection, user: str | None = None) -> None:
        """`NotAllowed` unless who sends this may change things; ``user`` is the name they have signed in with."""
        if self._token is not None and hmac.compare_digest(_token_sent(request).encode(), self._token):
            return
        if not _from_another_site(request) and (user or (self._trust_local and _is_local(request))):
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
    """From this machine, under a name of it: a name of somebody else's can be rebound to this machine."""
    hostname = _split(f"//{request.headers.get('host', '')}").hostname
    if hostname != "localhost" and not _is_address(hostname or ""):
        return False
    # uvicorn has put the address of a proxy's client in place of the proxy's, where the proxy told it.
    client = request.client
    return client is not None and _is_address(client.host) and ipaddress.ip_address(client.host).is_loopback


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _from_another_site(request: HTTPConnection) -> bool:
    """Whether a browser sends this for a page of somebody else.

    Browsers say so themselves over https and on localhost; else they name the origin of whatever changes things.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is not None and _split(origin).netloc != request.headers.get("host", "")


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:  # no address at all
        return urlsplit("")
