"""Simulated cards with a name: the books of each are in a file, for all programs of this user on this machine.

The file is removed with the last process that uses the card or, if that one is killed, when a process opens the next
card with a name.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from .ledger import BOOKS_BYTES, Ledger, attached, attaching

#: The cards that this process has opened, by path.
_open: dict[Path, Ledger] = {}

if hasattr(os, "register_at_fork"):
    # A forked child opens the file again: what it has of its parent are copies of its own (see `Ledger`).
    os.register_at_fork(after_in_child=_open.clear)


def books_of(name: str, capacity_bytes: int) -> Ledger:
    """Opens the books of a card, or makes them with this capacity."""
    path = path_of(name)
    with attaching:
        if (ledger := _open.get(path)) is None:
            for other in path.parent.glob(path_of("*").name):
                with suppress(OSError):
                    _remove_if_unused(other)
            fd = _opened(path)
            if os.fstat(fd).st_size < BOOKS_BYTES:
                os.ftruncate(fd, BOOKS_BYTES)
                os.pwrite(fd, capacity_bytes.to_bytes(8, sys.byteorder), BOOKS_BYTES - 8)
            ledger = _open[path] = Ledger.in_file(fd)
            fcntl.lockf(fd, fcntl.LOCK_UN)
            atexit.register(_leave, ledger, path)
        return ledger


def path_of(name: str) -> Path:
    """Returns the file of the card with this name."""
    return Path(tempfile.gettempdir(), f"simulated-card-{os.getuid()}-{name}")


def _opened(path: Path) -> int:
    """Opens a file, and makes it if necessary; returns its descriptor, locked."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.lockf(fd, fcntl.LOCK_EX)
        if _is_at(fd, path):
            return fd
        os.close(fd)  # another process has removed it in between


def _leave(ledger: Ledger, path: Path) -> None:
    """At the end of this process: removes the file if no other process uses it."""

    def remove(ledger: Ledger) -> None:
        ledger.drop(os.getpid())
        if not ledger.users():
            path.unlink(missing_ok=True)

    if ledger.is_shared:  # not the copy of a forked child
        ledger.locked(remove)


def _remove_if_unused(path: Path) -> None:
    """Removes the file of a card whose processes have all been killed. Raises OSError for one that is locked."""
    about = path.stat()
    if (about.st_dev, about.st_ino) in attached:
        return
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(fd, path) and not Ledger.copied(os.pread(fd, BOOKS_BYTES, 0)).users():
            path.unlink()
    finally:
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.stat())
    return False
