"""A latch: a thread waits on it until another one opens it, once.

A bare lock that is held until it is opened. Unlike a `threading.Condition`, whose methods are Python code, it survives
an interrupt (Ctrl-C) of the waiting thread at any moment: nothing that others need is left held or let go.
"""

from __future__ import annotations

import contextlib
import threading


def new_latch() -> threading.Lock:
    """A latch that is closed."""
    latch = threading.Lock()
    latch.acquire()
    return latch


def open_latch(latch: threading.Lock) -> None:
    """Let the thread that waits on it go on; opening it twice is no error."""
    with contextlib.suppress(RuntimeError):  # it is open
        latch.release()
