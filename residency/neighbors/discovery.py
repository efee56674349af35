"""Finds the servers behind processes that use the card: their listening ports, and those of their parents."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Collection, Iterator, Sequence
from urllib.parse import urlsplit

import psutil

from ..addresses import EVERY_ADDRESS, bracketed, is_loopback, without_mapping
from ..errors import NeighborUnreachable
from .contract import Neighbor
from .server import Server

logger = logging.getLogger(__name__)


def search(
    pids: Collection[int], own_pids: Collection[int], kinds: Sequence[type[Server]]
) -> list[tuple[int, Neighbor]]:
    """Returns the servers of these processes, where it finds one; see `residency.neighbors.find`."""
    confirmed: dict[Server, bool] = {}
    found: list[tuple[int, Neighbor]] = []
    parents = {parent.pid for own_pid in own_pids for parent in _parents(own_pid)}
    for pid in dict.fromkeys(pids):
        for process in _family(pid, frozenset(own_pids)):
            if process.pid in parents:  # it would end our processes
                continue
            server = next((each for each in _candidates(process, kinds) if _confirm(each, confirmed)), None)
            if server is not None:
                found.append((pid, server))
                break
    return found


def started_us(url: str, command: re.Pattern[str]) -> bool:
    """Returns whether a parent of this process listens on the port of an address of this machine.

    ``command``: in the command line of a parent whose ports the system does not tell (of another user), this counts as
    listening.
    """
    address = urlsplit(url)
    port = address.port or (443 if address.scheme == "https" else 80)
    for parent in _parents(os.getpid()) if _is_here(address.hostname or "") else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            try:
                if port in (at for _, at in _listening(parent)):
                    return True
            except psutil.AccessDenied:
                if command.search(" ".join(parent.cmdline())):
                    return True
    return False


def _is_here(host: str) -> bool:
    """Returns whether a host is this machine; also true for one that has no address, which cannot be asked."""
    own = {each.address for addresses in psutil.net_if_addrs().values() for each in addresses} | {*EVERY_ADDRESS}
    try:
        found = {str(each[4][0]) for each in socket.getaddrinfo(host, None)}
    except OSError:
        return True
    return any(is_loopback(each) or without_mapping(each) in own for each in found)


def _parents(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).parents()
    except psutil.Error:
        return []


def _family(pid: int, own_pids: frozenset[int]) -> list[psutil.Process]:
    """Returns a process and its parents, the oldest first: it started the others, and so decides about them."""
    try:
        family = [psutil.Process(pid), *_parents(pid)]
    except psutil.Error:
        return []
    return [] if any(each.pid in own_pids for each in family) else family[::-1]


def _candidates(process: psutil.Process, kinds: Sequence[type[Server]]) -> Iterator[Server]:
    """Yields a server for each kind that the command line suggests, and for each listening port, the likely first."""
    try:
        words = process.cmdline()
        text = " ".join([*words, _folder(process)])
        suggested = [kind for kind in kinds if kind.command.search(text)]
        if not suggested or not _in_our_network(process.pid):
            return
        addresses = _listening(process)
    except psutil.Error:
        return
    for kind in suggested:
        for host, port in sorted(addresses, key=lambda at: (not _names(words, at[1]), at[1] != kind.port, at)):
            yield kind(f"http://{bracketed(host)}:{port}")


def _names(words: Sequence[str], port: int) -> bool:
    return any(word == str(port) or word.endswith((f"={port}", f":{port}")) for word in words)


def _folder(process: psutil.Process) -> str:
    try:
        return str(process.cwd())
    except psutil.Error:  # of another user
        return ""


def _in_our_network(pid: int) -> bool:
    """Whether its ports are ours: those of a container may be other programs' here."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net")
    except PermissionError:  # of another user, whose ports the system does not tell either
        return False
    except OSError:  # a system without namespaces
        return True


def _listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Returns hosts and ports; ``::`` may accept IPv4 too, and a host may have no loopback address of IPv6."""
    connections = getattr(process, "net_connections", None) or process.connections  # psutil 5
    here = {"0.0.0.0": "127.0.0.1", "::": "localhost"}
    return {
        (here.get(each.laddr.ip, without_mapping(each.laddr.ip)), each.laddr.port)
        for each in connections(kind="tcp")
        if each.status == psutil.CONN_LISTEN
    }


def _confirm(server: Server, confirmed: dict[Server, bool]) -> bool:
    if server not in confirmed:
        try:
            server.held()
        except NeighborUnreachable as error:
            logger.debug("%s", error)
            confirmed[server] = False
        else:
            confirmed[server] = True
    return confirmed[server]
