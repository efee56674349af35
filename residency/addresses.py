"""Host names and addresses, as in a Host header, in a link, and in ``--server-name``."""

from __future__ import annotations

import ipaddress

EVERY_ADDRESS = ("0.0.0.0", "::")
"""Bind addresses for all addresses of the machine; ``::`` includes IPv4."""


def link(host: str, port: int, scheme: str = "http") -> str:
    """Returns the URL, for a browser on this machine, of a server that listens on ``host``."""
    if host in EVERY_ADDRESS:
        host = "localhost"
    return f"{scheme}://{bracketed(host)}:{port}"


def serving(host: str, port: int, scheme: str = "http") -> str:
    """Returns a log line in English and Chinese that names the server's addresses and which machines reach them."""
    here = link(host, port, scheme)
    if host not in EVERY_ADDRESS:
        return f"Serving on {here} / 服务已启动"
    return (
        f"Serving on {here} and on every other address of this machine ({host}), so that other machines reach it too; "
        f"--server-name 127.0.0.1 is this machine only / 服务已启动，监听本机的所有地址（{host}），其他机器也能访问；"
        f"仅限本机请用 --server-name 127.0.0.1"
    )


def bracketed(host: str) -> str:
    """Encloses an IPv6 address in brackets, as in URLs."""
    return f"[{host}]" if ":" in host else host


def hostname(header: str) -> str:
    """Returns the host of a Host header in lower case, without port, brackets and final dot; empty if there is none."""
    header = header.strip().lower()
    if header.startswith("[") and "]" in header:
        return header[1:].partition("]")[0]
    host, _, port = header.rpartition(":")
    if host and port.isdecimal() and not is_address(header):  # not an IPv6 address without brackets
        header = host
    return header.removesuffix(".")


def is_address(host: str | None) -> bool:
    """Returns whether the host is an IP address, not a name."""
    try:
        ipaddress.ip_address(str(host))
    except ValueError:
        return False
    return True


def without_mapping(address: str) -> str:
    """Converts an IPv4-mapped IPv6 address (``::ffff:127.0.0.1``) to IPv4; returns others unchanged."""
    try:
        return str(getattr(ipaddress.ip_address(address), "ipv4_mapped", None) or address)
    except ValueError:
        return address


def is_loopback(host: str | None) -> bool:
    """Returns whether the host is always this machine: localhost, a name below it, or a loopback address."""
    if not is_address(host):
        return host is not None and (host == "localhost" or host.endswith(".localhost"))
    # A socket for IPv4 and IPv6 reports IPv4 clients as ::ffff:127.0.0.1.
    return ipaddress.ip_address(without_mapping(str(host))).is_loopback
