"""Whether a server could listen; asked before a model loads. Brings no Gradio, so that the answer is quick."""

from __future__ import annotations

import socket

from ..errors import InvalidInput


def check_port(host: str, port: int) -> None:
    """`InvalidInput` if nobody could listen there now."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the server will do it: a port whose last connections are still closing counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name that no host can have, such as a..b
        reason = getattr(error, "strerror", None) or "not a name of a host"
        raise InvalidInput(
            f"Cannot listen on {host}, port {port} ({reason}). Choose another with --server-port (or address "
            f"with --server-name), or stop the program that uses it",
            f"无法监听 {host} 的端口 {port}（{reason}）。"
            f"请用 --server-port 换端口（或用 --server-name 换地址），或停止占用它的程序",
        ) from error
