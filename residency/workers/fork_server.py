"""The fork server: a process that has imported torch and has never used CUDA; workers are forked from it.

A fork takes milliseconds where a new process needs seconds for its imports. The server is single-threaded. It ends with
the manager's process, also after ``kill -9``, and ends its workers and their child processes then; the workers end with
the server (``PR_SET_PDEATHSIG``). Linux only.
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
import traceback
import warnings

import psutil

PRELOADED = ("torch", "numpy", "residency.memory.engine", "residency.workers.worker")
"""Imported before the first fork. Those that are not installed are left out."""

ANSWER = struct.Struct("!cqq")
"""``b"+"`` (a worker was forked) or ``b"-"`` (it has ended), its process ID, and its exit status as of `os.waitpid`."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(control_fd: int, manager_pid: int) -> None:
    """Serves until the manager's process ends, or closes its end of the socket ``control_fd``.

    A request is one byte, with the worker's end of its connection as a descriptor.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the manager decides when its workers end
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # adopts the child processes of ended workers, to end them too
    control = socket.socket(fileno=control_fd)
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    manager_fd = os.pidfd_open(manager_pid)
    _preload()
    _Server(control, woken, wake, manager_fd).serve()


def _preload() -> None:
    import importlib

    for module in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a worker would copy the shared pages


class _Server:
    def __init__(self, control: socket.socket, woken: socket.socket, wake: socket.socket, manager_fd: int) -> None:
        self._control, self._woken, self._wake, self._manager_fd = control, woken, wake, manager_fd
        self._workers: set[int] = set()

    def serve(self) -> None:
        poller = select.poll()
        for each in (self._control, self._woken, self._manager_fd):
            poller.register(each, select.POLLIN)
        try:
            while True:
                ready = {fd for fd, _ in poller.poll()}
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
            pid = os.fork()
        if pid == 0:
            self._become_worker(fds[0], server_pid)
        os.close(fds[0])
        self._workers.add(pid)
        self._control.sendall(ANSWER.pack(b"+", pid, 0))
        return True

    def _become_worker(self, fd: int, server_pid: int) -> None:
        code = 1
        try:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != server_pid:
                return
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for each in (self._control, self._woken, self._wake):
                each.close()
            os.close(self._manager_fd)
            os.setsid()
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
        """Collects ended workers, and ends child processes that they have left behind."""
        ended = {}
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                ended[found[0]] = found[1]
        if not ended:
            return
        for child in psutil.Process().children():
            if child.pid not in self._workers:
                with contextlib.suppress(psutil.Error):
                    child.kill()
        for pid in self._workers & ended.keys():
            self._control.sendall(ANSWER.pack(b"-", pid, ended[pid]))
        self._workers -= ended.keys()

    def _end_all(self) -> None:
        """Kills the workers and everything that they started, and waits for their end."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
                for child in psutil.Process().children():
                    with contextlib.suppress(psutil.Error):
                        child.kill()


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
