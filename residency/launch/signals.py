"""SIGINT, SIGTERM and SIGHUP (a terminal was closed): the first asks for an orderly end, a second ends it at once."""

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
    """From entering on, the first signal raises KeyboardInterrupt in the main thread, where this is made.

    At a second one what was given to `at_once` is called, and the process is gone with exit code 128 + the signal's
    number. A thread of its own sees to that, so that a main thread inside native code does not delay it. Once the
    block has been left, a first signal raises nothing more. Who has nothing else to do calls `wait`: where Python
    swallows what a signal raises (in ``__del__``, in callbacks of weak references), that ends all the same.
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
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
                signal.signal(number, self._asked)
        threading.Thread(target=self._watch, name="app-signals", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.interrupt_no_more()

    def wait(self) -> None:
        """Return once a signal has come."""
        self._came.wait()

    def at_once(self, deed: Callable[[], object]) -> None:
        """Have this called before a second signal ends the process; the latest first. It must be quick."""
        self._last_deeds.insert(0, deed)

    def interrupt_no_more(self) -> None:
        """From now on a first signal raises nothing: the end is under way."""
        self._interrupts = False

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self._interrupts:
            self._interrupts = False
            raise KeyboardInterrupt

    def _watch(self) -> None:
        asked = False
        while True:
            for number in self._reading.recv(64):  # one byte for each signal, whoever handles it
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
