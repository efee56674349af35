"""Locks that work in forked children, although the threads that held them do not exist there."""

from __future__ import annotations

import os
import weakref
from typing import Any, TypeVar

Lock = TypeVar("Lock")

_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def renewed_in_children(lock: Lock) -> Lock:
    """Releases a `threading.Lock` or `RLock` in each child that this process forks; returns the lock."""
    _locks.add(lock)
    return lock


def _renew() -> None:
    for lock in list(_locks):
        lock._at_fork_reinit()  # as `threading`, `logging` and `concurrent.futures` do with theirs


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
