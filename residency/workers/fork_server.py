"""The fork server: a process that has imported torch and has never used CUDA; workers are forked from it.

A fork takes milliseconds where a new process needs seconds for its imports. The server is single-threaded. It ends with
the manager's process, also after ``kill -9``, and ends its workers and their child processes then; the workers end with
the server (``PR_SET_PDEATHSIG``). If both are killed at the same moment, a guard ends what the workers have started.
Linux only.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Collection, Iterable

import psutil

from ..memory.self_moving.orphans import MARK
from .process_name import name_process

PRELOADED = ("torch", "numpy", "residency.memory.engine", "residency.workers.worker")
"""Imported before the first fork. Those that are not installed are left out."""

ANSWER = struct.Struct("!cqq")
"""``b"+"`` (a worker was forked), ``b"-"`` (it has ended) or ``b"!"`` (a fork has failed); then its process ID, and its
status as of `os.waitpid`, or the error number."""

CLEAN_UP_WITHIN_S = 2.0
"""Time for trackers of an ended worker (`multiprocessing`, torch) to remove its shared memory."""

_TRACKERS = ("multiprocessing.resource_tracker", "torch_shm_manager")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(control_fd: int, manager_pid: int) -> None:
    """Serves until the manager's process ends, or closes its end of the socket ``control_fd``.

    A request is one byte, with the worker's end of its connection as a descriptor.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the manager decides when its workers end
    name_process("gpu-fork-server")
    guard_pid = _fork_guard(control_fd)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # adopts the child processes of ended workers, to end them too
    control = socket.socket(fileno=control_fd)
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    try:
        manager_fd = os.pidfd_open(manager_pid)
    except ProcessLookupError:
        os.kill(guard_pid, signal.SIGKILL)
        return
    _preload()
    _Server(control, woken, wake, manager_fd, guard_pid).serve()


def _fork_guard(control_fd: int) -> int:
    """Forks a process that waits for the end of this one, and then ends what the workers have left behind."""
    server_pid = os.getpid()
    if guard_pid := os.fork():
        return guard_pid
    try:
        os.close(control_fd)
        os.setsid()
        name_process("gpu-guard")
        server_fd = os.pidfd_open(server_pid)
        if os.getppid() == server_pid:
            select.select([server_fd], [], [])
        end_left_behind(os.environ[MARK])
    finally:
        os._exit(0)


def end_left_behind(mark: str, workers: Collection[int] = ()) -> None:
    """Ends what the workers of an ended server have started: processes with its mark, or in a worker's session."""
    for _ in range(3):  # a process may fork meanwhile
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                ours = os.getsid(process.pid) in workers or process.environ().get(MARK) == mark
                if ours and process.pid != os.getpid():
                    process.kill()


def _preload() -> None:
    import importlib

    for module in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a worker would copy the shared pages


class _Server:
    def __init__(
        self, control: socket.socket, woken: socket.socket, wake: socket.socket, manager_fd: int, guard_pid: int
    ) -> None:
        self._control, self._woken, self._wake, self._manager_fd = control, woken, wake, manager_fd
        self._guard_pid = guard_pid
        self._workers: set[int] = set()
        #: Status and time of the end of workers whose end is not reported yet.
        self._ended: dict[int, tuple[int, float]] = {}

    def serve(self) -> None:
        poller = select.poll()
        for each in (self._control, self._woken, self._manager_fd):
            poller.register(each, select.POLLIN)
        try:
            while True:
                ready = {fd for fd, _ in poller.poll(50 if self._ended else None)}
                if self._manager_fd in ready or (self._control.fileno() in ready and not self._answer()):
                    return
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
                self._reap()
        except OSError:
            return  # the manager has closed its end
        finally:
            self._end_all()

    def _answer(self) -> bool:
        """Forks one worker; returns False at the end of the connection."""
        request, ancillary, _, _ = self._control.recvmsg(1, socket.CMSG_SPACE(4))
        fds = array.array("i")
        for _, _, data in ancillary:
            fds.frombytes(data)
        if not request or not fds:
            return False
        server_pid = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which numpy's library starts and restarts
            try:
                pid = os.fork()
            except OSError as error:
                pid, code = -1, error.errno or 0
        if pid == 0:
            self._become_worker(fds[0], server_pid)
        os.close(fds[0])
        if pid < 0:
            self._control.sendall(ANSWER.pack(b"!", 0, code))
            return True
        self._workers.add(pid)
        self._control.sendall(ANSWER.pack(b"+", pid, 0))
        return True

    def _become_worker(self, fd: int, server_pid: int) -> None:
        code = 1
        try:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what it starts stays below it, as daemons do not otherwise
            if os.getppid() != server_pid:
                return
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for each in (self._control, self._woken, self._wake):
                each.close()
            os.close(self._manager_fd)
            os.setsid()
            name_process("gpu-worker")
            for number in _SIGNALS:
                signal.signal(number, lambda *_: None)  # not SIG_IGN, which programs that it starts would inherit
            os.register_at_fork(before=_hold_signals, after_in_parent=_take_signals, after_in_child=_default_signals)
            from .worker import serve

            serve(socket.socket(fileno=fd))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        """Collects ended workers, ends what they have left behind, and then reports their end."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                if found[0] in self._workers:
                    self._workers.remove(found[0])
                    self._ended[found[0]] = found[1], time.monotonic()
                elif found[0] == self._guard_pid:
                    self._guard_pid = _fork_guard(self._control.fileno())
        if not self._ended:
            return
        late_s = time.monotonic() - CLEAN_UP_WITHIN_S
        late = any(ended_s < late_s for _, ended_s in self._ended.values())
        kept = {self._guard_pid, *self._workers}
        left = [child for child in psutil.Process().children() if child.pid not in kept]
        _kill(left, late)
        if left and not late:
            return
        for pid, (status, _) in self._ended.items():
            self._control.sendall(ANSWER.pack(b"-", pid, status))
        self._ended.clear()

    def _end_all(self) -> None:
        """Kills the workers and everything that they have started, waits for their end, and kills the guard."""
        late_s = time.monotonic() + CLEAN_UP_WITHIN_S
        with contextlib.suppress(ChildProcessError):
            while True:
                children = psutil.Process().children(recursive=True)
                others = [child for child in children if child.pid != self._guard_pid]
                _kill(others or children, time.monotonic() > late_s)
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass
                time.sleep(0.01)


def _kill(processes: Iterable[psutil.Process], trackers: bool) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if trackers or not any(name in " ".join(process.cmdline()) for name in _TRACKERS):
                process.kill()


_masks = threading.local()


def _hold_signals() -> None:
    """Before a worker forks: a signal to the new child process waits until it has its own handlers."""
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _take_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _default_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _take_signals()


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
