"""A server that gives recorded answers and keeps the requests that it got."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from local_server import serving


@dataclass(frozen=True)
class Reply:
    """``body``: bytes, text, or what becomes JSON."""

    body: object = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def data(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        return (self.body if isinstance(self.body, str) else json.dumps(self.body)).encode()


Conversation = dict[str, "Reply | Callable[[], Reply]"]
"""Answers by method and path, with the query; other calls get ``unknown``."""


class RecordedServer:
    """``calls``: method, path and JSON body of each request; ``headers``: the last request's."""

    def __init__(self, replies: Conversation, unknown: Reply) -> None:
        self.replies, self.unknown = replies, unknown
        self.calls: list[str] = []
        self.headers: dict[str, str] = {}

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(handler) -> None:
                self._reply(handler)

            do_POST = do_GET

            def log_message(handler, *_: object) -> None:
                """Prints nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _reply(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0)).decode()
        call = f"{handler.command} {handler.path}"
        self.calls.append(f"{call} {body}".strip())
        self.headers = dict(handler.headers)
        found = self.replies.get(call, self.unknown)
        reply = found if isinstance(found, Reply) else found()
        handler.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.data)), "Connection": "close", **reply.headers}.items():
            if value:
                handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(reply.data)
        handler.close_connection = True


@contextmanager
def recorded(replies: Conversation, unknown: Reply = Reply({"error": "not found"}, 404)) -> Iterator[RecordedServer]:
    server = RecordedServer(replies, unknown)
    with serving(server.server):
        yield server
