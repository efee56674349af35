"""Limits the rate of wrong passwords, API keys and tokens."""

from __future__ import annotations

import ipaddress
import math
import threading
import time
from collections.abc import Callable

from starlette.requests import HTTPConnection

from ...errors import NotAllowed

FAILURES, ONE_EVERY_S = 5, 10.0
"""Limit per address or browser: a burst, then one failure per interval."""
_USERS = 10_000


class TooManyWrongKeys(NotAllowed):
    """This address has sent too many wrong keys or tokens; ``retry_s``: seconds after which it may send another."""

    def __init__(self, retry_s: int) -> None:
        super().__init__(
            f"Too many wrong keys or tokens from this address: wait {retry_s} s, then send one of the server's "
            f"(--api-key, --control-token).",
            f"此地址发送错误密钥或令牌的次数过多：请等待 {retry_s} 秒，再发送服务器的密钥或令牌"
            f"（--api-key、--control-token）。",
        )
        self._arguments = (retry_s,)
        self.retry_s = retry_s


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


class Guesses:
    """Limits wrong keys and tokens per address, as passwords are (`Logins`). Thread-safe.

    After too many, only those that were used from that address before are accepted there.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._wrong = RateLimit(FAILURES, ONE_EVERY_S)
        self._users: dict[tuple[str, str], None] = {}

    def check(self, request: HTTPConnection, sent: str, right: bool) -> None:
        """Counts ``sent``, the key or token of a request, if it is not ``right``; raises `TooManyWrongKeys`."""
        user = (address, _) = (network(request), sent)
        with self._lock:
            now_s = self._now()
            if wait_s := 0.0 if right and user in self._users else self._wrong.wait_s(address, now_s):
                raise TooManyWrongKeys(math.ceil(wait_s))
            if not right:
                return self._wrong.take(address, now_s)
            self._users[user] = self._users.pop(user, None)
            if len(self._users) > _USERS:
                del self._users[next(iter(self._users))]


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
