"""Decides which requests may use the calls under ``/v1``."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable

from starlette.requests import HTTPConnection

from .permissions import Permissions, token_sent


class ApiKeys:
    """With keys, a request needs one of them, or the control token. Without, all requests that may read the page pass.

    ``signed_in`` returns the name of a request's signed-in user, or None; None if the page has no login.
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
