"""Decides which requests may use the calls under ``/v1``."""

from __future__ import annotations

import hmac
import math
import time
from collections.abc import Callable, Iterable

from starlette.requests import HTTPConnection

from ...errors import ResidencyError
from .permissions import Permissions, token_sent
from .rate_limit import FAILURES, ONE_EVERY_S, RateLimit, network

_USERS = 10_000


class WrongKey(ResidencyError):
    """The request has no API key, or a wrong one."""

    en = "Send one of the server's API keys (--api-key) as 'Authorization: Bearer KEY'."
    zh = "请以请求头 'Authorization: Bearer KEY' 发送服务器的一个 API 密钥（--api-key）。"


class TooManyWrongKeys(ResidencyError):
    """This address has sent too many wrong keys; ``retry_s``: seconds after which it may send another."""

    def __init__(self, retry_s: int) -> None:
        super().__init__(
            f"Too many wrong API keys from this address: wait {retry_s} s, then send one of the server's (--api-key).",
            f"此地址发送错误的 API 密钥次数过多：请等待 {retry_s} 秒，再发送服务器的密钥（--api-key）。",
        )
        self._arguments = (retry_s,)
        self.retry_s = retry_s


class ApiKeys:
    """With keys, a request needs one of them, or the control token. Without, all requests that may read the page pass.

    Wrong keys are limited per address, as passwords are (`Logins`). After too many, only keys that were used from that
    address before are accepted there. `check` is for the thread of the server's loop. ``signed_in`` returns the name of
    a request's signed-in user, or None; None if the page has no login.
    """

    def __init__(
        self,
        keys: Iterable[str],
        permissions: Permissions,
        signed_in: Callable[[HTTPConnection], str | None] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = [key.encode() for key in keys]
        self._permissions = permissions
        self._signed_in = signed_in
        self._now = now
        self._wrong = RateLimit(FAILURES, ONE_EVERY_S)
        self._users: dict[tuple[str, str], None] = {}

    def check(self, request: HTTPConnection) -> None:
        """Raises `WrongKey` or `TooManyWrongKeys` unless the request may use the engine and read the voices."""
        allowed, sent = self.may_speak(request), token_sent(request)
        if self._keys and sent and not self._permissions.knows_token(request):
            address, now_s = network(request), self._now()
            user = (address, sent)
            wait_s = 0.0 if allowed and user in self._users else self._wrong.wait_s(address, now_s)
            if wait_s:
                raise TooManyWrongKeys(math.ceil(wait_s))
            if allowed:
                self._users[user] = self._users.pop(user, None)
                if len(self._users) > _USERS:
                    del self._users[next(iter(self._users))]
            else:
                self._wrong.take(address, now_s)
        if not allowed:
            raise WrongKey

    def knows(self, request: HTTPConnection) -> bool:
        """Whether the request has one of the keys. Takes the same time for each key."""
        sent = token_sent(request).encode()
        found = False
        for key in self._keys:
            found |= hmac.compare_digest(sent, key)
        return found

    def may_speak(self, request: HTTPConnection) -> bool:
        """Whether the request may use the engine and read the voices."""
        if self.knows(request) or self._permissions.knows_token(request):
            return True
        return not self._keys and (self._signed_in is None or self._signed_in(request) is not None)

    def may_change(self, request: HTTPConnection) -> bool:
        """Whether the request may store and delete voices, and decide how long the model stays on the device."""
        user = self._signed_in(request) if self._signed_in else None
        return self.knows(request) or (self.may_speak(request) and self._permissions.allows(request, user))
