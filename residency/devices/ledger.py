"""The books of a simulated card: a row for each process. Pickled, they are shared with the process that unpickles them.

Shared books are in an anonymous file (memfd, Linux), which the other process opens through ``/proc``; until then the
process that pickled them keeps them. Each number in a row is one aligned word, so that a process killed at any moment
leaves whole rows.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..locks import renewed_in_children

T = TypeVar("T")

RUNNING, LOCKED, CHECKPOINTED, FAILED = range(4)
"""States of a process, by its checkpoint; the bytes of a checkpointed one are not on the card."""

_POLL_S = 0.001
_ROWS = 256
BOOKS_BYTES = 8 * (2 + 7 * _ROWS)

attaching = renewed_in_children(threading.Lock())
#: The shared books of this process, by device and inode, guarded by ``attaching``: closing a second descriptor of a
#: file would end the lock of the first.
attached: weakref.WeakValueDictionary[tuple[int, int], Ledger] = weakref.WeakValueDictionary()


class Ledger:
    """Columns with a word for each row, after the number of rows used so far; to be used in calls of `locked`.

    The last word is the capacity of a card with a name.

    ``owners``: the process whose books these are, for it and its workers; on a card with a name there are several.
    A row is free if its ``pids`` is 0. ``started`` is 0 where unknown: then the row never ends by itself. A forked
    child gets a copy of its own, in which its parent's row is its row, unless the books are pickled to it.
    """

    def __init__(self) -> None:
        #: Of this process. Reentrant: garbage collection may call `SimulatedDevice.unpin` in a locked block.
        self.lock = threading.RLock()
        self._pid = self._owner = os.getpid()
        #: Whether row 0 is that of this process, which runs, and there is no other.
        self.alone = True
        self._own = 0
        self._file: tuple[int, int, int] | None = None  # descriptor, device, inode
        self._close: weakref.finalize[..., Any] | None = None
        self._use(memoryview(bytearray(BOOKS_BYTES)))
        self._words[0], self.pids[0], self.owners[0] = 1, self._pid, self._pid
        renewed_in_children(self)

    def _use(self, raw: memoryview) -> None:
        self._words = words = raw.cast("q")
        columns = [words[first : first + _ROWS] for first in range(1, len(words) - 1, _ROWS)]
        self.pids, self.owners, self.started, self.charged, self.reported, self.context, self.states = columns

    def locked(self, act: Callable[..., T], *arguments: Any) -> T:
        """Calls ``act`` with these books and the arguments while no other thread or process uses them."""
        with self.lock:
            if self._file is None:
                return act(self, *arguments)
            fcntl.lockf(self._file[0], fcntl.LOCK_EX)  # ends with its process
            try:
                return act(self, *arguments)
            finally:
                fcntl.lockf(self._file[0], fcntl.LOCK_UN)

    def used(self, act: Callable[..., T], *arguments: Any) -> T:
        """Like `locked`, also with the row of this process; waits while a checkpoint keeps it from the card."""
        found: tuple[T] | None
        while (found := self.locked(Ledger._if_running, act, arguments)) is None:
            time.sleep(_POLL_S)
        return found[0]

    def _if_running(self, act: Callable[..., T], arguments: tuple[Any, ...]) -> tuple[T] | None:
        if self.pids[self._own] != self._pid:
            self._own = self.row_of(self._pid)
        return (act(self, self._own, *arguments),) if self.states[self._own] == RUNNING else None

    def take(self, row: int, nbytes: int, context_bytes: int, capacity_bytes: int) -> tuple[int, int] | None:
        """Adds bytes to a row, and a context if it has none; returns (needed, free) bytes if there is no room."""
        missing_bytes = context_bytes - self.context[row]
        if (free_bytes := self.free_bytes(nbytes + missing_bytes, capacity_bytes)) < nbytes + missing_bytes:
            return nbytes + missing_bytes, free_bytes
        if missing_bytes:
            self.context[row] = context_bytes
        self.charged[row] += nbytes
        return None

    def give(self, row: int, nbytes: int) -> None:
        self.charged[row] -= nbytes

    def free_bytes(self, needed_bytes: int, capacity_bytes: int) -> int:
        """Looks for ended processes only if more is needed."""
        free_bytes = capacity_bytes - self.held_bytes()
        if needed_bytes > free_bytes:
            self.drop_ended()
            free_bytes = capacity_bytes - self.held_bytes()
        return max(0, free_bytes)

    def held_bytes(self) -> int:
        held_bytes = 0
        for row in range(self._words[0]):
            if self.pids[row] and self.states[row] != CHECKPOINTED:
                held_bytes += self.charged[row] + self.reported[row] + self.context[row]
        return held_bytes

    def sizes(self) -> tuple[int, int, int]:
        """Returns all bytes on the card, and of this owner those of models, and those of contexts."""
        if self.alone:
            return self._bytes_of(0), self.charged[0], self.context[0]
        self.drop_ended()
        rows = [row for row in self._rows_on_card() if self.owners[row] == self._owner]
        return self.held_bytes(), sum([self.charged[row] for row in rows]), sum([self.context[row] for row in rows])

    def by_process(self) -> dict[int, int]:
        """Returns the bytes of each process that has any."""
        self.drop_ended()
        held = {self.pids[row]: self._bytes_of(row) for row in self._rows_on_card()}
        return {pid: nbytes for pid, nbytes in held.items() if nbytes}

    def report(self, pid: int, nbytes: int) -> None:
        """Sets the bytes that a process holds besides those charged."""
        row = self.row_of(pid) if nbytes else self.find(pid)
        if row is not None:
            self.reported[row] = nbytes
            if pid != self._pid and self.states[row] == RUNNING and not self._bytes_of(row):
                self.pids[row] = 0

    def report_workers(self, host_bytes: Mapping[int, int], awake: bool) -> bool:
        """Reports bytes of processes that are awake, or that have freed none of them; returns whether they are."""
        reported = [self.reported[row] for row in self._rows() if self.pids[row] in host_bytes]
        awake = awake or sum(host_bytes.values()) > 0.95 * sum(reported) > 0
        for pid, nbytes in host_bytes.items():
            self.report(pid, nbytes if awake else 0)
        return awake

    def row_of(self, pid: int) -> int:
        """Returns the row of a process; adds it if there is none."""
        row, started = self.find(pid), started_at(pid)
        if row is not None:
            if self.started[row] == started or (row == self._own and pid == self._pid):
                return row
            self.pids[row] = 0  # of an earlier process of that number
        self.alone = False
        row = self._free_row()
        for column in (self.charged, self.reported, self.context, self.states):
            column[row] = 0
        self.started[row], self.owners[row] = started, self._owner
        self.pids[row] = pid  # last: from now on the row counts
        return row

    def _free_row(self) -> int:
        if all(self.pids):
            self.drop_ended()
        for row, pid in enumerate(self.pids):
            if not pid:
                self._words[0] = max(self._words[0], row + 1)
                return row
        raise RuntimeError(f"more than {_ROWS} processes use this simulated card")

    def find(self, pid: int) -> int | None:
        return next((row for row in self._rows() if self.pids[row] == pid), None)

    def _rows(self) -> list[int]:
        return [row for row in range(self._words[0]) if self.pids[row]]

    def _rows_on_card(self) -> list[int]:
        return [row for row in self._rows() if self.states[row] != CHECKPOINTED]

    def _bytes_of(self, row: int) -> int:
        return self.charged[row] + self.reported[row] + self.context[row]

    def drop(self, pid: int) -> None:
        """Removes the row of a process."""
        if (row := self.find(pid)) is not None:
            self.pids[row] = 0

    def drop_ended(self) -> None:
        """Removes the rows of other processes that have ended, also if nobody has waited for them."""
        for row in self._rows():
            pid, started = self.pids[row], self.started[row]
            if pid != self._pid and started and started_at(pid) != started:
                self.pids[row] = 0

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state_of(self, pid: int) -> int | None:
        """Returns the state of a process; None if it has ended."""
        self.drop_ended()
        if not started_at(pid):
            return None
        row = self.find(pid)
        return RUNNING if row is None else self.states[row]

    def bytes_in(self, pid: int) -> int:
        """Returns the bytes of a process that are on the card, or have left it with a checkpoint."""
        row = self.find(pid)
        return 0 if row is None else self._bytes_of(row)

    def set_state(self, pid: int, state: int) -> None:
        self.alone = False
        self.states[self.row_of(pid)] = state

    def change(
        self, pid: int, before: int, after: int, capacity_bytes: int
    ) -> tuple[int | None, tuple[int, int] | None]:
        """Sets the state of a process that is ``before``; returns its state, and what `take` returns."""
        found = self.state_of(pid)
        if found == before == CHECKPOINTED and (needed_bytes := self.bytes_in(pid)) > (
            free_bytes := self.free_bytes(needed_bytes, capacity_bytes)
        ):
            return found, (needed_bytes, free_bytes)
        if found == before:
            self.set_state(pid, after)
        return found, None

    # -- other processes --------------------------------------------------------------------------------------------

    @classmethod
    def in_file(cls, fd: int) -> Ledger:
        """Uses books in a file of ``BOOKS_BYTES`` that is locked, and adds this process to them."""
        ledger = cls()
        ledger._attach(fd)
        ledger._own = ledger.row_of(os.getpid())
        return ledger

    @classmethod
    def copied(cls, raw: bytes) -> Ledger:
        """Returns a copy of the books in a file, which may be shorter than ``BOOKS_BYTES``."""
        ledger = cls()
        ledger._use(memoryview(bytearray(raw.ljust(BOOKS_BYTES, b"\0"))))
        return ledger

    @property
    def capacity_bytes(self) -> int:
        """Of a card with a name."""
        return self._words[-1]

    @property
    def is_shared(self) -> bool:
        """Whether they are in a file, and not those of this process alone."""
        return self._file is not None

    def users(self) -> set[int]:
        """Returns the processes with a row that run."""
        rows = [row for row in self._rows() if self.started[row]]
        return {self.pids[row] for row in rows if started_at(self.pids[row]) == self.started[row]}

    def __reduce__(self) -> tuple[Callable[..., Ledger], tuple[int, ...]]:
        with attaching, self.lock:
            if self._file is None:
                self._share()
            assert self._file is not None
            return _attach, (os.getpid(), self._owner, *self._file)

    def _share(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise pickle.PicklingError("a simulated card can be shared between processes on Linux only")
        fd = os.memfd_create("simulated-card")
        os.ftruncate(fd, BOOKS_BYTES)
        self.started[self._own] = started_at(self._pid)
        os.pwrite(fd, self._words, 0)
        self._attach(fd)

    def _attach(self, fd: int) -> None:
        self._close = weakref.finalize(self, os.close, fd)
        self._close.atexit = False
        about = os.fstat(fd)
        self._file = fd, about.st_dev, about.st_ino
        self._use(memoryview(mmap.mmap(fd, BOOKS_BYTES)))
        self.alone = False
        attached[self._file[1:]] = self

    def _at_fork_reinit(self) -> None:
        """Called in each forked child; see `renewed_in_children`."""
        self.lock._at_fork_reinit()  # type: ignore[attr-defined]
        parent, self._pid = self._pid, os.getpid()
        if self._file is not None:
            attached.pop(self._file[1:], None)
            self._file = None
            self._use(memoryview(bytearray(self._words)))
            assert self._close is not None
            self._close()
        if self.pids[self._own] == parent:
            self.pids[self._own], self.started[self._own] = self._pid, 0
        for row in self._rows():
            self.owners[row] = self._pid if self.owners[row] == self._owner else self.owners[row]
        self._owner = self._pid


def _attach(pid: int, owner: int, fd: int, device: int, inode: int) -> Ledger:
    """Opens the books that a process has pickled; raises FileNotFoundError if that process has ended."""
    with attaching:
        ledger = attached.get((device, inode))
        if ledger is None:
            path = f"/proc/{pid}/fd/{fd}"
            ledger, here = Ledger(), os.open(path, os.O_RDWR | os.O_CLOEXEC)
            about = os.fstat(here)
            if (about.st_dev, about.st_ino) != (device, inode):
                os.close(here)
                raise FileNotFoundError(f"{path} is no longer the simulated card")
            ledger._attach(here)
            ledger._owner = owner
            ledger._own = -1
            ledger._own = ledger.locked(Ledger.row_of, os.getpid())
        return ledger


def started_at(pid: int) -> int:
    """Returns when a process started, in ticks since the start of the system; 0 if it has ended, or where unknown."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *values = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if state in b"ZX" else int(values[18])
