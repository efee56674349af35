"""Handles forks and the end of the process for managers."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import Protocol

_EXIT_WITHIN_S = 5.0


class ProcessLifetime(Protocol):
    """An object that is notified of a fork and of the process's end."""

    def leave_to_the_parent(self) -> None:
        """Called in a forked child: locks may be held by threads that do not exist here; the parent owns the models."""

    def wind_up(self, within_s: float) -> None:
        """Called at the interpreter's end, when no thread of this package may be inside native code."""


_alive: weakref.WeakSet[ProcessLifetime] = weakref.WeakSet()


def end_with_the_process(mortal: ProcessLifetime) -> None:
    """Registers an object for both calls. Keeps only a weak reference."""
    _alive.add(mortal)


def _forked() -> None:
    for mortal in list(_alive):
        mortal.leave_to_the_parent()
    _alive.clear()


def _exiting() -> None:
    for mortal in list(_alive):
        mortal.wind_up(_EXIT_WITHIN_S)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
atexit.register(_exiting)
