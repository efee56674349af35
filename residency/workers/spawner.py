"""Starts the fork server of a manager, and workers from it."""

from __future__ import annotations

import array
import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoResult

import psutil

from ..errors import InvalidInput
from ..locks import renewed_in_children
from ..memory.self_moving.orphans import MARK
from ..observability.process_memory import claim_tree
from ..sentences import Sentence
from .fork_server import ANSWER, end_left_behind

logger = logging.getLogger(__name__)

FORKS_WITHIN_S = 120.0
"""Longest wait for a worker, including the first imports of the fork server."""

CLOSES_WITHIN_S = 10.0
"""Time for the fork server to end its workers; then it is killed."""


_CLOSED = Sentence("the fork server of the worker processes is closed", "工作进程的 fork 服务进程已关闭")
_SILENT = Sentence("the fork server of the worker processes does not answer", "工作进程的 fork 服务进程没有响应")
_ENDED = Sentence("the fork server of the worker processes has ended", "工作进程的 fork 服务进程已结束")


class Child:
    """A forked worker. ``status`` is that of `os.waitpid` once it ``has_ended``; None if the server ended first."""

    def __init__(self, pid: int, on_end: Callable[[], object]) -> None:
        self.pid = pid
        self.status: int | None = None
        self.has_ended = threading.Event()
        self._on_end = on_end
        self._lock = renewed_in_children(threading.Lock())
        self._owner_pid = os.getpid()
        self._pidfd = os.pidfd_open(pid)

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, even if the server has not told yet."""
        with self._lock:
            if self.has_ended.is_set():
                return True
            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            return bool(poller.poll(0))

    def kill(self) -> None:
        """Ends it at once, also while it is stopped or hangs."""
        with self._lock, contextlib.suppress(OSError):
            if not self.has_ended.is_set() and os.getpid() == self._owner_pid:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _end(self, status: int | None) -> None:
        with self._lock:
            self.status = status
            self.has_ended.set()
            os.close(self._pidfd)
        try:
            self._on_end()
        except Exception:
            logger.exception("The end of the worker process %d was not handled", self.pid)


class Spawner:
    """The fork server of one manager; starts it anew if it has ended. Thread-safe."""

    def __init__(self) -> None:
        self._lock = renewed_in_children(threading.Lock())
        self._server: _Server | None = None
        self._closed = False
        self._owner_pid = os.getpid()

    def start(self) -> _Server:
        """Starts the server, which imports torch meanwhile, unless it runs; returns at once."""
        with self._lock:
            if self._closed:
                raise ChildProcessError(_CLOSED)
            if self._server is None or self._server.ended:
                self._server = _Server()
            return self._server

    def spawn(self, connection: socket.socket, on_end: Callable[[], object]) -> Child:
        """Forks a worker that serves ``connection``. Calls ``on_end`` once after its end, in another thread.

        Raises OSError if that is not possible; `ChildProcessError` if the server has ended, twice.
        """
        try:
            return self.start().fork(connection, on_end)
        except ChildProcessError:  # perhaps long ago
            return self.start().fork(connection, on_end)

    def close(self) -> None:
        """Ends the server, and with it all workers and what they have started. Idempotent."""
        if os.getpid() != self._owner_pid:
            return
        with self._lock:
            self._closed, server, self._server = True, self._server, None
        if server is not None:
            server.close()


class _Server:
    """One fork server, and its workers."""

    def __init__(self) -> None:
        self.ended = self._closing = False
        self._forking = renewed_in_children(threading.Lock())
        self._fork: tuple[Future[Child], Callable[[], object]] | None = None
        self._children: dict[int, Child] = {}
        self._mark = uuid.uuid4().hex
        self._control, theirs = socket.socketpair()
        path = [entry for entry in sys.path if isinstance(entry, str)]
        program = (
            f"import sys; sys.path[:] = {path!r}\n"
            f"from residency.workers.fork_server import main; main({theirs.fileno()}, {os.getpid()})"
        )
        with theirs:
            # A session of its own: Ctrl-C in a terminal reaches the manager only.
            self._process = subprocess.Popen(
                [sys.executable, "-c", program], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                start_new_session=True, env={**os.environ, MARK: self._mark},
            )  # fmt: skip
        with contextlib.suppress(psutil.Error):
            claim_tree(psutil.Process(self._process.pid))
        threading.Thread(target=self._read, name="gpu-worker-server", daemon=True).start()

    def fork(self, connection: socket.socket, on_end: Callable[[], object]) -> Child:
        """Forks a worker. Raises `ChildProcessError` if the server has ended, OSError if it cannot fork."""
        with self._forking:
            answer: Future[Child] = Future()
            self._fork = answer, on_end
            rights = array.array("i", [connection.fileno()])
            try:
                if self.ended:
                    raise ChildProcessError
                self._control.sendmsg([b"f"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                return answer.result(FORKS_WITHIN_S)
            except NoResult:
                self.ended = True
                self._process.kill()
                raise ChildProcessError(_SILENT) from None
            except OSError as error:
                if answer.done():
                    raise
                self.ended = True
                raise ChildProcessError(_ENDED) from error
            finally:
                self._fork = None

    def close(self) -> None:
        self._closing = True
        with contextlib.suppress(OSError):  # it has ended
            self._control.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(CLOSES_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while len(data := self._control.recv(ANSWER.size, socket.MSG_WAITALL)) == ANSWER.size:
                kind, pid, status = ANSWER.unpack(data)
                if kind == b"-" and (child := self._children.pop(pid, None)) is not None:
                    child._end(status)
                elif kind != b"-" and (fork := self._fork) is not None:
                    self._answer(kind, pid, status, *fork)
        self.ended = True
        if self._process.wait():  # killed: it has ended nothing
            end_left_behind(self._mark, self._children.keys())
        if not self._closing:
            logger.warning("The fork server of the worker processes has ended; the next load starts another one.")
        self._control.close()
        if (fork := self._fork) is not None and not fork[0].done():
            fork[0].set_exception(ChildProcessError(_ENDED))
        for child in self._children.values():
            child._end(None)
        self._children.clear()

    def _answer(self, kind: bytes, pid: int, status: int, answer: Future[Child], on_end: Callable[[], object]) -> None:
        if kind == b"!":
            answer.set_exception(OSError(status, os.strerror(status)))
            return
        try:
            # The server collects its exit code only after this answer.
            child = self._children[pid] = Child(pid, on_end)
        except (OSError, psutil.Error) as error:
            answer.set_exception(OSError(str(error)))
            return
        answer.set_result(child)


def can_fork_workers() -> bool:
    """Returns whether the system has what workers need, and permits it: Linux, process descriptors, memory files."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        for fd in (os.pidfd_open(os.getpid()), os.memfd_create("gpu-worker-check")):
            os.close(fd)
    except (AttributeError, OSError):  # an old kernel, or a sandbox
        return False
    return True


def check_system() -> None:
    """Raises `InvalidInput` where workers cannot be forked."""
    if not can_fork_workers():
        raise InvalidInput(
            "Process isolation needs Linux 5.3 or newer, and permission for pidfd_open and memfd_create: use "
            '--gpu-isolation none (isolation="none")',
            "进程隔离需要 Linux 5.3 或更新版本，并允许 pidfd_open 和 memfd_create："
            '请使用 --gpu-isolation none（isolation="none"）',
        )
