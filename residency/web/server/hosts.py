"""Checks the Host header of requests from this machine, against DNS rebinding.

Another site can resolve its name to 127.0.0.1. The browser then treats this server as part of that site, which may
read everything that a user of this machine may. Only the Host header, which has the other site's name, reveals this:
such a page may set any other header.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ...addresses import hostname, is_address, is_loopback, without_mapping
from ...errors import NotAllowed
from .layers import http_layer

_UNKNOWN = (
    "The host name {name} is not allowed: another site could use it to read this server (DNS rebinding). If it is "
    "yours, start the app with --allowed-host {name} (or GPU_TTS_ALLOWED_HOSTS={name}), or with --auth; on this "
    "machine itself, use {scheme}://localhost:{port}. / 不允许通过主机名 {name} 访问：其他网站可能借此读取本服务器"
    "（DNS 重绑定）。如果这是您的域名，请在启动时加上 --allowed-host {name}（或设置 GPU_TTS_ALLOWED_HOSTS={name}），"
    "或使用 --auth；在本机请访问 {scheme}://localhost:{port}。"
)
_CONTAINER_MARKS = (".dockerenv", "run/.containerenv")
"""Files that Docker and Podman create in each container."""
_HOST_INTERFACES = ("docker0", "podman0", "cni-podman0")
_DEFAULT_ROUTE = "00000000"


class Hosts:
    """`around` is an ASGI middleware that refuses requests from this machine with an unknown Host header.

    Known are the names of this machine, all IP addresses (they cannot be rebound), and the ``allowed`` names. Requests
    for which ``may_pass`` returns True, and requests without a Host header (no browser), pass. The middleware must be
    outside of any that replaces the peer's address by ``X-Forwarded-For``. ``gateway`` is the address of callers on
    the host of this container.
    """

    def __init__(
        self,
        allowed: Iterable[str] = (),
        may_pass: Callable[[HTTPConnection], bool] = lambda request: False,
        gateway: str | None = None,
    ) -> None:
        machine = socket.gethostname().lower()
        short = machine.partition(".")[0]
        self._known = {machine, short, f"{short}.local", *(name.lower() for name in allowed)}
        self._may_pass = may_pass
        self._gateway = gateway or container_gateway()

    def allow(self, name: str) -> None:
        self._known.add(name.lower())

    @http_layer
    async def around(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        request = HTTPConnection(scope)
        name = hostname(request.headers.get("host", ""))
        if self._is_here(scope) and not (self._knows(name) or self._passes(request)):
            shown = name if re.fullmatch(r"[\w.-]{1,100}", name) else "NAME"
            port = (scope.get("server") or ("", 7860))[1]
            text = _UNKNOWN.format(name=shown, port=port, scheme=scope.get("scheme", "http"))
            await PlainTextResponse(text, 403, {"X-Content-Type-Options": "nosniff"})(scope, receive, send)
        else:
            await app(scope, receive, send)

    def _knows(self, name: str) -> bool:
        return not name or name in self._known or is_address(name) or is_loopback(name)

    def _passes(self, request: HTTPConnection) -> bool:
        try:
            return self._may_pass(request)
        except NotAllowed:  # after too many wrong keys
            return False

    def _is_here(self, scope: Scope) -> bool:
        """Whether the peer's address is a loopback address, the server's own address, or the gateway."""
        client, server = scope.get("client"), scope.get("server")
        if client is None:
            return False
        address = without_mapping(client[0])
        called = without_mapping(server[0]) if server else None
        return is_loopback(address) or address in (called, self._gateway)


def container_gateway(root: Path = Path("/")) -> str | None:
    """Returns the gateway of a container's own network: the IPv4 address of callers on the host (``docker run -p``).

    None outside of a container, and with the host's network, where callers have their own addresses. ``root`` is the
    root of the file system.
    """
    if not any((root / mark).exists() for mark in _CONTAINER_MARKS):
        return None
    if any((root / "sys/class/net" / name).exists() for name in _HOST_INTERFACES):
        return None
    try:
        # Columns: interface, destination, gateway (hexadecimal, in the machine's byte order), and others.
        routes = [line.split() for line in (root / "proc/net/route").read_text().splitlines()[1:]]
        found = next(route[2] for route in routes if route[1] == _DEFAULT_ROUTE)
        return socket.inet_ntoa(struct.pack("=L", int(found, 16)))
    except (OSError, StopIteration, IndexError, ValueError, struct.error):
        return None
