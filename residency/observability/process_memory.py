"""Main memory of processes, as the system reports it; None where unknown. Never raises."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path

import psutil

from ..locks import renewed_in_children

_claims_lock = renewed_in_children(threading.Lock())
_claimed: set[tuple[int, float]] = set()
_claimed_trees: set[tuple[int, float]] = set()


def own_bytes() -> int | None:
    """Returns anonymous and shared main memory of this process; None if unknown."""
    return _kilobytes(Path("/proc/self/status"), ("RssAnon", "RssShmem"))


def private_bytes(process: psutil.Process) -> int | None:
    """Returns the main memory that ends with a process; None if it has ended, or is not readable."""
    return _kilobytes(Path(f"/proc/{process.pid}/smaps_rollup"), ("Private_Dirty",))


def claim(processes: Collection[psutil.Process]) -> None:
    """Declares that a resident accounts for the memory of these worker processes."""
    with _claims_lock:
        _claimed.update(map(_identity, processes))


def unclaim(processes: Collection[psutil.Process]) -> None:
    """Ends `claim`."""
    with _claims_lock:
        _claimed.difference_update(map(_identity, processes))


def claim_tree(process: psutil.Process) -> None:
    """Declares that residents account for the memory of a process and of all its descendants, also later ones."""
    with _claims_lock:
        _claimed_trees.add(_identity(process))


def heads_claimed_tree(process: psutil.Process) -> bool:
    return _identity(process) in _claimed_trees


def is_claimed(process: psutil.Process) -> bool:
    """Returns whether a resident accounts for the memory of a process."""
    return _identity(process) in _claimed


def _identity(process: psutil.Process) -> tuple[int, float]:
    return process.pid, process.create_time()


def _kilobytes(path: Path, names: tuple[str, ...]) -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in path.read_text(encoding="ascii", errors="replace").splitlines()
                     if ":" in line)  # fmt: skip
        return sum(int(lines[name].split()[0]) << 10 for name in names)
    except (OSError, KeyError, ValueError):
        return None
