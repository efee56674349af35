"""Checks whether a server can listen, before models load. Imports no Gradio, to be fast."""

from __future__ import annotations

import socket

from ..errors import InvalidInput


def refusal(host: str, port: int) -> OSError | UnicodeError | None:
    """Binds as a server does; returns the error, if any. Port 0 checks the host only.

    Returns UnicodeError for an impossible host name, such as a..b.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As in the server: a port whose last connections are still closing counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        return error
    return None


def reason(error: OSError | UnicodeError) -> str:
    """Returns the system's message for a refusal."""
    return getattr(error, "strerror", None) or "not a name of a host"


def check_port(host: str, port: int) -> None:
    """Raises `InvalidInput` if a server cannot listen there."""
    if error := refusal(host, port):
        raise InvalidInput(
            f"Cannot listen on {host}, port {port} ({reason(error)}). Choose another with --server-port (or address "
            f"with --server-name), or stop the program that uses it",
            f"无法监听 {host} 的端口 {port}（{reason(error)}）。"
            f"请用 --server-port 换端口（或用 --server-name 换地址），或停止占用它的程序",
        ) from error
