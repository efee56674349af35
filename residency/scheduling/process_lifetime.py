"""Managers and the life of their process: forked children, and the end of the interpreter."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import Protocol

_EXIT_WITHIN_S = 5.0


class ProcessLifetime(Protocol):
    """An object that reacts to the process's fork and end."""

    def leave_to_the_parent(self) -> None:
        """This process is a fork: locks may be held by threads that are not here, and models are the parent's."""

    def wind_up(self, within_s: float) -> None:
        """The interpreter ends: no thread of ours may be inside native code then."""


_alive: weakref.WeakSet[ProcessLifetime] = weakref.WeakSet()


def end_with_the_process(mortal: ProcessLifetime) -> None:
    """Call its methods when this process forks or ends."""
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
