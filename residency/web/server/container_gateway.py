"""Finds the gateway of a container's own network: the address of callers on the host."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

_MARKS = (".dockerenv", "run/.containerenv")
"""Files that Docker and Podman create in each container."""
_HOST_INTERFACES = ("docker0", "podman0", "cni-podman0")
_DEFAULT_ROUTE = "00000000"


def gateway(root: Path = Path("/")) -> str | None:
    """Returns the IPv4 address of callers on the host (``docker run -p``); None outside of such a container.

    None also with the host's network, where callers have their own addresses. ``root`` is the root of the file system.
    """
    if not any((root / mark).exists() for mark in _MARKS):
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
