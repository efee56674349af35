"""Whether a server could listen; asked before a model loads. Brings no Gradio, so that the answer is quick."""

from __future__ import annotations

import socket

from ..errors import InvalidInput


def refusal(host: str, port: int) -> OSError | UnicodeError | None:
    """The error that a server would get that listens there now; port 0 asks about the host alone.

    UnicodeError is of a name that no host can have, such as a..b.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the server will do it: a port whose last connections are still closing counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        return error
    return None


def reason(error: OSError | UnicodeError) -> str:
    """A refusal in the words of the system."""
    return getattr(error, "strerror", None) or "not a name of a host"


def check_port(host: str, port: int) -> None:
    """`InvalidInput` if nobody could listen there now."""
    if error := refusal(host, port):
        raise InvalidInput(
            f"Cannot listen on {host}, port {port} ({reason(error)}). Choose another with --server-port (or address "
            f"with --server-name), or stop the program that uses it",
            f"无法监听 {host} 的端口 {port}（{reason(error)}）。"
            f"请用 --server-port 换端口（或用 --server-name 换地址），或停止占用它的程序",
        ) from error
