"""Limits the rate of wrong passwords and API keys."""

from __future__ import annotations

import ipaddress

from starlette.requests import HTTPConnection

FAILURES, ONE_EVERY_S = 5, 10.0
"""Limit per address or browser: a burst, then one failure per interval."""


class RateLimit:
    """A token bucket for each key: a burst of ``at_once``, then one every ``every_s`` seconds.

    Stores for each key the time at which its bucket is full again, and drops the key after that.
    """

    def __init__(self, at_once: int, every_s: float) -> None:
        self._ahead_s, self._every_s = (at_once - 1) * every_s, every_s
        self._even_at_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._even_at_s)

    def wait_s(self, key: str, now_s: float) -> float:
        return max(0.0, self._even_at_s.get(key, now_s) - now_s - self._ahead_s)

    def take(self, key: str, now_s: float) -> None:
        self._even_at_s = {other: even_s for other, even_s in self._even_at_s.items() if even_s > now_s}
        self._even_at_s[key] = self._even_at_s.get(key, now_s) + self._every_s

    def give_back(self, key: str) -> None:
        if key in self._even_at_s:
            self._even_at_s[key] -= self._every_s


def network(request: HTTPConnection) -> str:
    """Returns the client's address; for IPv6 the /64 network, which one customer gets."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((int(address), 64), strict=False))
    return host
