"""Life of app.py as a process: signals that end it, and its folder for recordings."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

from ..errors import InvalidInput
from ..marked_folders import marked_folder
from .settings import Settings

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Handling of SIGINT, SIGTERM and SIGHUP (closed terminal) as a ``with`` block of the main thread.

    The first signal raises KeyboardInterrupt in the main thread, but not after the block. A second one calls the
    callbacks of `before_quit` and exits with code 128 + the signal's number; a thread does this, since native code may
    block the main thread. `wait` also returns if Python swallows the exception (in ``__del__``, in weak reference
    callbacks).
    """

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], object]] = [_kill_children]
        self._interrupts = True
        self._came = threading.Event()
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)

    def __enter__(self) -> Signals:
        signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        for number in _NUMBERS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self._interrupt)
        threading.Thread(target=self._watch, name="app-signals", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.disable_interrupt()

    def wait(self) -> None:
        """Waits for the first signal."""
        self._came.wait()

    def before_quit(self, callback: Callable[[], object]) -> None:
        """Adds a callback for the second signal, called in reverse order. It must be fast."""
        self._callbacks.insert(0, callback)

    def disable_interrupt(self) -> None:
        """Disables KeyboardInterrupt for the first signal, during the shutdown."""
        self._interrupts = False

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._interrupts:
            self._interrupts = False
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while True:
            for number in self._reading.recv(64):  # one byte for each signal, with any handler
                if number in _NUMBERS and self._came.is_set():
                    self._quit(number)
                if number in _NUMBERS:
                    self._came.set()

    def _quit(self, number: int) -> None:
        try:
            for callback in self._callbacks:
                with suppress(Exception):
                    callback()
        finally:
            os._exit(128 + number)


def _kill_children() -> None:
    """Kills the child processes: those of vLLM, also during its load, would run on and keep their GPU memory."""
    import psutil  # imports what ``--help`` does not need

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if not any("resource_tracker" in part for part in child.cmdline()):  # ends by itself, and deletes files
                child.kill()


@contextmanager
def recordings_folder(parent: str, signals: Signals) -> Iterator[str]:
    """Creates a folder for uploads and results as `private_folder`, also for Gradio; deletes it at the end."""
    with private_folder(parent) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        signals.before_quit(lambda: shutil.rmtree(folder, ignore_errors=True))
        try:
            yield folder
        finally:
            signals.disable_interrupt()


@contextmanager
def private_folder(parent: str) -> Iterator[str]:
    """Creates a `marked_folder` in the value of ``--tmp-dir``; raises `InvalidInput` if that is not possible."""
    with ExitStack() as stack:
        try:
            if parent == Settings.tmp_dir and os.path.lexists(parent) and not _is_safe(parent):
                parent += f"-{os.getuid()}"  # the default belongs to another user
                if os.path.lexists(parent) and not _is_safe(parent):
                    raise PermissionError(errno.EPERM, "another user created it", parent)
            folder = stack.enter_context(marked_folder(parent, "editx-"))
        except OSError as error:
            raise InvalidInput(
                f"Cannot write to --tmp-dir {parent} ({error.strerror}): give another folder",
                f"无法写入 --tmp-dir {parent}（{error.strerror}）：请换一个目录",
            ) from error
        yield folder


def _is_safe(folder: str) -> bool:
    """Returns whether it is a folder, no link, writable, and with content that other users cannot replace."""
    found = os.lstat(folder)
    replaceable = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
    ours = found.st_uid in (os.geteuid(), 0) and not replaceable
    return stat.S_ISDIR(found.st_mode) and ours and os.access(folder, os.W_OK)
