"""Starts the fork server of a manager, and workers from it."""

from __future__ import annotations

import array
import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future

import psutil

from ..errors import InvalidInput
from ..locks import renewed_in_children
from ..observability.process_memory import claim_tree
from .fork_server import ANSWER

logger = logging.getLogger(__name__)

FORKS_WITHIN_S = 120.0
"""Longest wait for a worker, including the first imports of the fork server."""

Ended = Callable[[int], object]


class Spawner:
    """The fork server of one manager; starts it anew if it has ended. Thread-safe."""

    def __init__(self) -> None:
        self._lock = renewed_in_children(threading.Lock())
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._forks: tuple[Future[tuple[int, int]], Ended] | None = None
        self._ended: dict[int, Ended] = {}
        self._owner_pid = os.getpid()

    def start(self) -> None:
        """Starts the server, which imports torch meanwhile; returns at once."""
        with self._lock:
            self._start_locked()

    def spawn(self, connection: socket.socket, ended: Ended) -> tuple[int, int]:
        """Forks a worker that serves ``connection``; returns its process ID and a descriptor of the process (pidfd).

        Calls ``ended`` once, in another thread, with its status (`os.waitpid`), or -1 if the server ended first.
        """
        with self._lock:
            control = self._start_locked()
            answer: Future[tuple[int, int]] = Future()
            self._forks = answer, ended
            rights = array.array("i", [connection.fileno()])
            try:
                control.sendmsg([b"f"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                return answer.result(FORKS_WITHIN_S)
            finally:
                self._forks = None

    def close(self) -> None:
        """Ends the server, and with it all workers and what they have started."""
        if os.getpid() != self._owner_pid:
            return
        with self._lock:
            server, control, self._server, self._control = self._server, self._control, None, None
        if control is not None:
            with contextlib.suppress(OSError):  # it has ended
                control.shutdown(socket.SHUT_RDWR)
        if server is not None:
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()

    def _start_locked(self) -> socket.socket:
        if self._control is not None:
            return self._control
        control, theirs = socket.socketpair()
        program = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from residency.workers.fork_server import main; main({theirs.fileno()}, {os.getpid()})"
        )
        with theirs:
            # A session of its own: Ctrl-C in a terminal reaches the manager only.
            server = subprocess.Popen(
                [sys.executable, "-c", program], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        with contextlib.suppress(psutil.Error):
            claim_tree(psutil.Process(server.pid))
        self._server, self._control = server, control
        threading.Thread(target=self._read, args=(control, server), name="gpu-worker-server", daemon=True).start()
        return control

    def _read(self, control: socket.socket, server: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(OSError):
            while len(data := control.recv(ANSWER.size, socket.MSG_WAITALL)) == ANSWER.size:
                kind, pid, status = ANSWER.unpack(data)
                if kind == b"+" and self._forks is not None:
                    self._forked(pid, *self._forks)
                elif kind == b"-":
                    self._report(pid, status)
        # The server has ended, and its workers with it.
        if self._control is control:
            logger.warning("The server of worker processes has ended; the next load starts another one.")
            self._control = self._server = None
            server.wait()
        control.close()
        if (forks := self._forks) is not None and not forks[0].done():
            forks[0].set_exception(ChildProcessError("The server of worker processes has ended."))
        for pid in list(self._ended):
            self._report(pid, -1)

    def _forked(self, pid: int, answer: Future[tuple[int, int]], ended: Ended) -> None:
        try:
            # The server collects its exit code only after this answer.
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            answer.set_exception(error)
            return
        self._ended[pid] = ended
        answer.set_result((pid, pidfd))

    def _report(self, pid: int, status: int) -> None:
        ended = self._ended.pop(pid, None)
        if ended is not None:
            ended(status)


def check_system() -> None:
    """Raises `InvalidInput` where workers cannot be forked."""
    if not sys.platform.startswith("linux") or not hasattr(os, "pidfd_open"):
        raise InvalidInput(
            'Process isolation needs Linux: use --gpu-isolation none (isolation="none")',
            '进程隔离需要 Linux：请使用 --gpu-isolation none（isolation="none"）',
        )
