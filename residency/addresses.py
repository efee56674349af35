"""Names and addresses of hosts: as they stand in a Host header, in a link, and in ``--server-name``."""

from __future__ import annotations

import ipaddress

EVERY_ADDRESS = ("0.0.0.0", "::")
"""With these a server listens on all addresses of the machine; ``::`` stands for IPv4 and IPv6."""


def link(host: str, port: int, scheme: str = "http") -> str:
    """Where a browser on this machine finds a server that listens on ``host``."""
    if host in EVERY_ADDRESS:
        host = "localhost"
    return f"{scheme}://{bracketed(host)}:{port}"


def serving(host: str, port: int, scheme: str = "http") -> str:
    """A line for the log, in English and Chinese: on which addresses a server listens that others may reach."""
    here = link(host, port, scheme)
    if host not in EVERY_ADDRESS:
        return f"Serving on {here} / 服务已启动"
    return (
        f"Serving on {here} and on every other address of this machine ({host}), so that other machines reach it too; "
        f"--server-name 127.0.0.1 is this machine only / 服务已启动，监听本机的所有地址（{host}），其他机器也能访问；"
        f"仅限本机请用 --server-name 127.0.0.1"
    )


def bracketed(host: str) -> str:
    """As links have it: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def hostname(header: str) -> str:
    """The host of a Host header, in lower case, without port, brackets and final dot; empty if there is none."""
    header = header.strip().lower()
    if header.startswith("[") and "]" in header:
        return header[1:].partition("]")[0]
    host, _, port = header.rpartition(":")
    if host and port.isdecimal() and not is_address(header):  # an IPv6 address without brackets is one as a whole
        header = host
    return header.removesuffix(".")


def is_address(host: str | None) -> bool:
    """Whether it is an IP address, and no name."""
    try:
        ipaddress.ip_address(str(host))
    except ValueError:
        return False
    return True


def without_mapping(address: str) -> str:
    """An IPv4 address that is written as IPv6 (``::ffff:127.0.0.1``) as IPv4; anything else as it is."""
    try:
        return str(getattr(ipaddress.ip_address(address), "ipv4_mapped", None) or address)
    except ValueError:
        return address


def is_loopback(host: str | None) -> bool:
    """Whether it is this machine for everybody: localhost, a name below it, or a loopback address."""
    if not is_address(host):
        return host is not None and (host == "localhost" or host.endswith(".localhost"))
    # As the clients of a socket for both kinds of addresses are told: ::ffff:127.0.0.1.
    return ipaddress.ip_address(without_mapping(str(host))).is_loopback
