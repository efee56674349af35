"""Decides which requests may use the calls under ``/v1``."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable

from starlette.requests import HTTPConnection

from ...errors import ResidencyError
from .permissions import Permissions, token_sent


class WrongKey(ResidencyError):
    """The request has no API key, or a wrong one."""

    en = "Send one of the server's API keys (--api-key) as 'Authorization: Bearer KEY'."
    zh = "请以请求头 'Authorization: Bearer KEY' 发送服务器的一个 API 密钥（--api-key）。"


class ApiKeys:
    """With keys, a request needs one of them, or the control token. Without, all requests that may read the page pass.

    Wrong keys count with the wrong tokens of ``permissions``. ``signed_in`` returns the name of a request's signed-in
    user, or None; None if the page has no login.
    """

    def __init__(
        self,
        keys: Iterable[str],
        permissions: Permissions,
        signed_in: Callable[[HTTPConnection], str | None] | None = None,
    ) -> None:
        self._keys = [key.encode() for key in keys]
        self._permissions = permissions
        self._signed_in = signed_in

    def check(self, request: HTTPConnection) -> None:
        """Raises `WrongKey` or `TooManyWrongKeys` unless the request may use the engine and read the voices."""
        if not self._is_open_to(request) and not self.passes(request):
            raise WrongKey

    def passes(self, request: HTTPConnection) -> bool:
        """Whether the request has a key or the token; counts wrong ones. Raises `TooManyWrongKeys`."""
        right = self.knows(request) or self._permissions.knows_token(request)
        return self._permissions.passes(request, right) if self._keys or self._permissions.has_token else False

    def knows(self, request: HTTPConnection) -> bool:
        """Whether the request has one of the keys. Takes the same time for each key."""
        sent = token_sent(request).encode()
        found = False
        for key in self._keys:
            found |= hmac.compare_digest(sent, key)
        return found

    def may_change(self, request: HTTPConnection) -> bool:
        """Whether a request that passed `check` may change voices, and decide how long the model stays on the device.

        Raises `TooManyWrongKeys`.
        """
        user = self._signed_in(request) if self._signed_in else None
        return self.knows(request) or self._permissions.allows(request, user)

    def _is_open_to(self, request: HTTPConnection) -> bool:
        return not self._keys and (self._signed_in is None or self._signed_in(request) is not None)
