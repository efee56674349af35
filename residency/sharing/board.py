"""The tickets of one card in a file, for all processes that are given its folder: SQLite is the lock and the storage.

SQLite, because a transaction of a process that is killed at any moment is undone by the next one, on each local file
system and across containers with a common folder. A process that is stopped within a transaction (some
milliseconds) keeps the others out: then each raises `BoardBusy` after `BUSY_AFTER_S` and goes on without the queue.
A power cut may damage the file, since nothing is forced to the disk: each start of the system has a file of its own.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import TypeVar

from ..sentences import Sentence
from .tickets import Ticket, Tickets

T = TypeVar("T")

BUSY_AFTER_S = 1.0
"""Maximum wait for a transaction of another process."""

_VERSION = 2
"""Version of the table: apps of different versions do not share a queue."""

_TABLE = (
    "create table if not exists tickets (key text primary key, model text, pid integer, arrived_s real, "
    "wanted_bytes integer, beat_s real, claimed integer, card_bytes integer, started integer)"
)


_BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Has a new value after each start of the kernel, which containers share."""

_OLD_AFTER_S = 24 * 3600.0
"""Time without a change after which a file of another start is removed."""


class BoardBusy(Exception):
    """The file is locked by a process that does not go on, or cannot be used; the argument says which."""


class Board:
    """The tickets of the card ``identity`` in ``folder``. Thread-safe; holds no file between calls."""

    def __init__(self, folder: Path, identity: str) -> None:
        name = "".join(sign if sign.isalnum() or sign in "-_" else "_" for sign in identity)
        boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
        self._opened_to_all = False
        self._of_all_starts = f"card-{name}-{_VERSION}-*"
        self.path = folder / f"card-{name}-{_VERSION}-{boot}.db"

    def change(self, act: Callable[[Tickets], tuple[Tickets, T]]) -> T:
        """Replaces the tickets by those that ``act`` returns, in one transaction; returns its other result."""
        with self._opened() as connection:
            connection.execute("begin immediate")
            before = _tickets(connection)
            after, result = act(before)
            gone, new = set(before) - set(after), set(after) - set(before)
            connection.executemany("delete from tickets where key = ?", [(ticket.key,) for ticket in gone])
            connection.executemany(
                "insert into tickets values (?, ?, ?, ?, ?, ?, ?, ?, ?)", [astuple(each) for each in new]
            )
            connection.execute("commit")
            return result

    def tickets(self, busy_after_s: float = BUSY_AFTER_S) -> Tickets:
        with self._opened(busy_after_s) as connection:
            return _tickets(connection)

    @contextlib.contextmanager
    def _opened(self, busy_after_s: float = BUSY_AFTER_S) -> Iterator[sqlite3.Connection]:
        try:
            self._open_to_all()
            with contextlib.closing(sqlite3.connect(self.path, busy_after_s, isolation_level=None)) as connection:
                connection.execute("pragma synchronous = off")  # tickets do not outlive the machine
                connection.execute("pragma journal_mode = persist")  # no file is made and removed each time
                connection.execute(_TABLE)
                yield connection
        except sqlite3.Error as error:
            raise BoardBusy(
                Sentence(f"{self.path} cannot be used ({error})", f"无法使用 {self.path}（{error}）")
            ) from error

    def _open_to_all(self) -> None:
        """Lets other users change the tickets and undo a transaction: the folder's rights say which users can."""
        if not self._opened_to_all:
            self._opened_to_all = True
            self._remove_old()
            for path in (self.path, Path(f"{self.path}-journal")):
                with contextlib.suppress(OSError):  # that of another user, who has done it
                    path.touch()
                    path.chmod(0o666)

    def _remove_old(self) -> None:
        with contextlib.suppress(OSError):  # those of another user
            for path in self.path.parent.glob(self._of_all_starts):
                if not path.name.startswith(self.path.name) and path.stat().st_mtime < time.time() - _OLD_AFTER_S:
                    path.unlink()


def _tickets(connection: sqlite3.Connection) -> Tickets:
    names = ", ".join(field.name for field in fields(Ticket))
    tickets = (Ticket(*row) for row in connection.execute(f"select {names} from tickets"))
    return tuple(replace(ticket, claimed=bool(ticket.claimed)) for ticket in tickets)


class PrivateBoard:
    """The tickets of this process alone. Thread-safe."""

    def __init__(self) -> None:
        self._tickets: Tickets = ()
        self._lock = threading.Lock()

    def change(self, act: Callable[[Tickets], tuple[Tickets, T]]) -> T:
        with self._lock:
            self._tickets, result = act(self._tickets)
            return result

    def tickets(self, busy_after_s: float = 0.0) -> Tickets:
        return self._tickets
