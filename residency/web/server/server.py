"""Uvicorn's HTTP server with limits on connections and on log messages about bad requests, as Gradio starts it."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import h11
from gradio import http_server
from gradio.route_utils import CustomCORSMiddleware
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...addresses import EVERY_ADDRESS, bracketed, link
from .bodies import BrokenOff
from .connections import Awaited, Connection, Connections, affordable, listeners

_ACCEPTED_AT_ONCE = 2
"""Connections accepted per loop iteration, so that new ones do not displace others before their first data is read."""
_FAILED = 3
_LOG_EVERY_S = 60.0


@contextmanager
def listening(around: Callable[[ASGIApp], ASGIApp]) -> Iterator[None]:
    """Patches how Gradio starts servers within this block.

    They are `BoundedServer`; ``around`` wraps the whole application, and its scope has the direct peers of the
    connections. ``server_name`` may be an IPv6 address, and ``::`` includes IPv4. Cross-origin reads are not permitted
    (no CORS headers), and errors are sent without tracebacks.
    """
    servers: Any = http_server
    start_server, before, name = servers.start_server, servers.Server, servers.LOCALHOST_NAME

    def start(app: Any, server_name: str, server_port: int, **keywords: Any) -> tuple[str, int, str, Any]:
        # Gradio permits other sites to read responses unless the host is localhost.
        app.user_middleware = [each for each in app.user_middleware if each.cls is not CustomCORSMiddleware]
        app.debug = False
        host = bracketed(server_name)
        _, port, url, started = start_server(app=app, server_name=host, server_port=server_port, **keywords)
        if server_name in EVERY_ADDRESS:
            url = f"{link(server_name, port, url.partition(':')[0])}/"
        return server_name, port, url, started

    # Gradio checks for a free port over IPv4, at an address that may be configured for other apps.
    servers.start_server, servers.Server, servers.LOCALHOST_NAME = start, partial(BoundedServer, around), "127.0.0.1"
    try:
        yield
    finally:
        servers.start_server, servers.Server, servers.LOCALHOST_NAME = start_server, before, name


class BoundedServer(http_server.Server):
    """Gradio's server with `Connections`. Always uses h11 and asyncio, even if others are installed."""

    def __init__(self, around: Callable[[ASGIApp], ASGIApp], config: Any, *arguments: Any, **keywords: Any) -> None:
        self._connections = Connections(affordable())
        config.http, config.ws, config.loop = partial(_Protocol, self._connections), "none", "asyncio"
        config.backlog = _ACCEPTED_AT_ONCE
        if config.host == "::":
            config.host = ""  # one socket per address family, since a socket for :: is IPv6 only
        super().__init__(config, *arguments, **keywords)
        config.load()
        config.loaded_app = around(config.loaded_app)
        logging.getLogger("uvicorn.error").addFilter(_OncePerMinute())

    def run(self, sockets: Any = None) -> None:
        config = self.config
        try:
            sockets = sockets or listeners(config.host, config.port, self._connections, plain=not config.is_ssl)
        except OSError as error:
            logging.getLogger("uvicorn.error").error(error)
            sys.exit(_FAILED)
        super().run(sockets)

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # every second
            self._connections.end_overdue()
        return await super().on_tick(counter)


class _Protocol(H11Protocol):
    """HTTP protocol that reports to `Connections` what it awaits from the peer.

    A response of HTTP/1.0 without a length ends with its connection. If it is incomplete, for whatever reason, the
    connection is reset, since an orderly end would make it look complete: to proxies (nginx uses HTTP/1.0), too.
    """

    def __init__(self, connections: Connections, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._all = connections
        self.app = partial(self._reset_if_incomplete, self.app)
        self._connection: Connection | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connection = self._all.of(transport.get_extra_info("socket").fileno())
        if self._connection is None:
            transport.abort()
        else:
            self._connection.look = self._awaited
            self._connection.buffered_bytes = transport.get_write_buffer_size

    async def _reset_if_incomplete(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        async def begins(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["http_version"] == "1.0":
                self._reset_at_close("content-length" not in Headers(raw=message["headers"]))
            await send(message)

        try:
            await app(scope, receive, begins)
        except BrokenOff:
            self.cycle.disconnected = True  # else uvicorn logs that the response is incomplete
            self.transport.close()

    def _reset_at_close(self, reset: bool) -> None:
        """Makes the system send a reset instead of an end, also when the process is killed."""
        with suppress(OSError):
            self.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", reset, 0)
            )

    def data_received(self, data: bytes) -> None:
        in_body = self.conn.their_state is h11.SEND_BODY
        super().data_received(data)
        self._note(len(data) if in_body else 0)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._reset_at_close(False)
        self._note(anew=True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._note(anew=True)

    def _note(self, received_bytes: int = 0, *, anew: bool = False) -> None:
        if self._connection:
            self._connection.note(received_bytes, anew=anew)

    def _awaited(self) -> Awaited | None:
        if self.flow.write_paused:
            return Awaited.READING
        cycle = self.cycle
        answering = cycle is not None and not cycle.response_complete
        if self.conn.their_state is h11.SEND_BODY:
            return None if self.flow.read_paused or (answering and cycle.waiting_for_100_continue) else Awaited.BODY
        return None if answering else Awaited.HEADERS

    def _unsupported_upgrade_warning(self) -> None:
        """Suppresses the warning: a WebSocket request gets an HTTP response."""


class _OncePerMinute(logging.Filter):
    """Log filter that passes each warning once a minute, since any client can cause them."""

    def __init__(self) -> None:
        super().__init__()
        self._passed_s: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        now_s = time.monotonic()
        if now_s - self._passed_s.get(record.msg, -_LOG_EVERY_S) < _LOG_EVERY_S:
            return False
        self._passed_s[record.msg] = now_s
        return True
