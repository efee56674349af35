"""A latch: a thread waits on it until another one opens it, once.

A bare lock that is held until it is opened. Unlike a `threading.Condition`, whose methods are Python code, it survives
an interrupt (Ctrl-C) of the waiting thread at any moment: nothing that others need is left held or let go.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any


def new_latch() -> threading.Lock:
    """A latch that is closed."""
    latch = threading.Lock()
    latch.acquire()
    return latch


def holds(lock: Any) -> bool:
    """Whether this thread has this `threading.RLock`: `threading.Condition` asks it so, too."""
    return bool(lock._is_owned())


def open_latch(latch: threading.Lock) -> None:
    """Let the thread that waits on it go on; opening it twice is no error."""
    with contextlib.suppress(RuntimeError):  # it is open
        latch.release()
