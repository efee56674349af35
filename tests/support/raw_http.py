"""Raw HTTP over a socket, for requests that client libraries cannot send."""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """``headers`` have lower-case names; values of repeated ones are separated by newlines."""

    status: int
    headers: dict[str, str]
    text: str


def ask(
    port: int,
    path: str = "/",
    *headers: str,
    method: str = "GET",
    body: bytes = b"",
    host: str | None = "localhost",
    address: str = "127.0.0.1",
    version: str = "1.1",
) -> Answer:
    """Sends one request with these header lines; reads the whole response. No Host header if ``host`` is None."""
    lines = [f"{method} {path} HTTP/{version}", "Connection: close", *headers]
    lines += [f"Host: {host}"] if host is not None else []
    lines += [f"Content-Length: {len(body)}"] if body or method == "POST" else []
    with socket.create_connection((address, port), timeout=60) as line:
        line.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        pieces, until_s = [], time.monotonic() + 60
        while piece := line.recv(1 << 16):
            pieces.append(piece)
            assert time.monotonic() < until_s, "it does not end"
    answer = b"".join(pieces).decode(errors="replace")
    head, _, text = answer.partition("\r\n\r\n")
    status = re.match(r"HTTP/1\.[01] (\d{3})", head)
    assert status, answer
    named: dict[str, list[str]] = {}
    for header in head.split("\r\n")[1:]:
        name, _, value = header.partition(": ")
        named.setdefault(name.lower(), []).append(value)
    return Answer(int(status[1]), {name: "\n".join(values) for name, values in named.items()}, text)


def begun(port: int, path: str, body: bytes, *headers: str, length: int | None = None) -> socket.socket:
    """Sends a POST request with the begin of a body, of ``length`` bytes in all; returns its connection."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body) if length is None else length}"]
    head = "\r\n".join([*lines, *headers, "", ""])
    line = socket.create_connection(("127.0.0.1", port), timeout=60)
    line.sendall(head.encode() + body)
    return line
