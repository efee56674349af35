"""SIGINT, SIGTERM and SIGHUP (closed terminal): the first starts an orderly end, the second ends at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Signal handling as a ``with`` block of the main thread.

    The first signal raises KeyboardInterrupt in the main thread, but not after the block. A second one calls the
    callbacks of `at_once` and exits with code 128 + the signal's number; a thread does this, since native code may
    block the main thread. `wait` also returns if Python swallows the exception (in ``__del__``, in weak reference
    callbacks).
    """

    def __init__(self) -> None:
        self._last_deeds: list[Callable[[], object]] = []
        self._interrupts = True
        self._came = threading.Event()
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)

    def __enter__(self) -> Signals:
        signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        for number in _NUMBERS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self._asked)
        threading.Thread(target=self._watch, name="app-signals", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.interrupt_no_more()

    def wait(self) -> None:
        """Waits for the first signal."""
        self._came.wait()

    def at_once(self, deed: Callable[[], object]) -> None:
        """Adds a callback for the second signal, called in reverse order. It must be fast."""
        self._last_deeds.insert(0, deed)

    def interrupt_no_more(self) -> None:
        """Disables KeyboardInterrupt for the first signal, during the shutdown."""
        self._interrupts = False

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self._interrupts:
            self._interrupts = False
            raise KeyboardInterrupt

    def _watch(self) -> None:
        asked = False
        while True:
            for number in self._reading.recv(64):  # one byte for each signal, with any handler
                if number in _NUMBERS and asked:
                    self._quit(number)
                if number in _NUMBERS:
                    asked = True
                    self._came.set()

    def _quit(self, number: int) -> None:
        try:
            for deed in self._last_deeds:
                with suppress(Exception):
                    deed()
        finally:
            os._exit(128 + number)
