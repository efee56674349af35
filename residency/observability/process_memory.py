"""Main memory of this process and of its children, as the system reports it; None where unknown. Never raises."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path

import psutil

from ..locks import renewed_in_children

_claims_lock = renewed_in_children(threading.Lock())
_claimed: set[tuple[int, float]] = set()


def own_bytes() -> int | None:
    """Returns anonymous and shared main memory of this process; None if unknown."""
    return _kilobytes(Path("/proc/self/status"), ("RssAnon", "RssShmem"))


def private_bytes(process: psutil.Process) -> int | None:
    """Returns the main memory that ends with a process; None if it has ended, or is not readable."""
    return _kilobytes(Path(f"/proc/{process.pid}/smaps_rollup"), ("Private_Dirty",))


def children() -> tuple[tuple[int, float, str, int | None], ...] | None:
    """Returns (pid, start in seconds, command line, private bytes) of each live descendant; None if unknown.

    Leaves out workers that a resident accounts for (`claim`).
    """
    try:
        found = psutil.Process().children(recursive=True)
    except (psutil.Error, OSError):
        return None
    return tuple(child for process in found if (child := child_of(process)) is not None)


def child_of(process: psutil.Process) -> tuple[int, float, str, int | None] | None:
    """Returns the entry of one process in `children`; None if it has ended or is accounted for."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE or (process.pid, process.create_time()) in _claimed:
            return None
        command = " ".join(process.cmdline())[:80] or process.name()
        return process.pid, process.create_time(), command, private_bytes(process)
    except (psutil.Error, OSError):
        return None


def claim(processes: Collection[psutil.Process]) -> None:
    """Excludes worker processes from `children`: a resident accounts for their memory."""
    with _claims_lock:
        _claimed.update((process.pid, process.create_time()) for process in processes)


def unclaim(processes: Collection[psutil.Process]) -> None:
    """Ends `claim`."""
    with _claims_lock:
        _claimed.difference_update((process.pid, process.create_time()) for process in processes)


def _kilobytes(path: Path, names: tuple[str, ...]) -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in path.read_text(encoding="ascii", errors="replace").splitlines()
                     if ":" in line)  # fmt: skip
        return sum(int(lines[name].split()[0]) << 10 for name in names)
    except (OSError, KeyError, ValueError):
        return None
