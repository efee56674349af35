"""Starts Python programs that need Gradio and torch without the import time of several seconds.

A server imports them once and forks for each program. The program is a separate process with its own pid, arguments,
environment and output; it handles signals and exits like a fresh interpreter. Only its imports are already done: tests
of imports and of a process's start use a fresh interpreter.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "torch", "soundfile", "residency.web.api.control", "residency.web.editx_tab", "residency.web.server.permissions",
    "residency.web.page", "gpu_manager", "tts_gpu_managed",
)  # fmt: skip
_REQUEST_BYTES = 1 << 17


def default_signals() -> None:
    """Resets signals in a new process: they may be ignored when tests run in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class ForkedProcess:
    """A program, given as for ``python -c``, with methods of `subprocess.Popen`; ``stdout`` is all output.

    ``paths`` are first in its ``sys.path``.
    """

    _server: socket.socket | None = None

    def __init__(
        self,
        script: str,
        arguments: Sequence[str],
        env: Mapping[str, str],
        cwd: Path = ROOT,
        paths: Sequence[Path] = (),
    ) -> None:
        if ForkedProcess._server is None:
            ForkedProcess._server = _start_server()
        self.args = [sys.executable, "-c", script, *arguments]
        self.returncode: int | None = None
        self._news, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reading, writing = os.pipe()
        self.stdout: IO[str] = os.fdopen(reading)
        program = {"script": script, "argv": ["-c", *arguments], "env": dict(env), "cwd": str(cwd)}
        request = json.dumps({**program, "paths": list(map(str, paths))}).encode()
        assert len(request) < _REQUEST_BYTES
        socket.send_fds(ForkedProcess._server, [request], [far_end.fileno(), writing])
        far_end.close()
        os.close(writing)
        self.pid = int(self._news.recv(64))

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            readable, _, _ = select.select([self._news], [], [], timeout)
            if not readable:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._news.recv(64))
            self._news.close()
        return self.returncode

    def send_signal(self, sign: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sign)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _start_server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = str(Path(__file__).parent)
    script = f"import sys; sys.path.insert(1, {path!r}); import fork_server; fork_server.serve({theirs.fileno()})"
    server = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, pass_fds=[theirs.fileno()], preexec_fn=default_signals,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    theirs.close()
    atexit.register(lambda: (ours.close(), server.wait()))
    return ours


def serve(requests_fd: int) -> None:
    """Forks for each request until the other end is closed; in a forked process, runs its program and returns."""
    requests = socket.socket(fileno=requests_fd)
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    while True:
        request, fds, _, _ = socket.recv_fds(requests, _REQUEST_BYTES, 2)
        if not request:
            return
        if os.fork() == 0:
            requests.close()
            return _start(json.loads(request), *fds)
        for fd in fds:
            os.close(fd)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _start(request: dict, news_fd: int, output_fd: int) -> None:
    """Runs the program in a child; in this process, sends the child's pid and exit code."""
    pid = os.fork()
    if pid == 0:
        os.close(news_fd)
        os.dup2(output_fd, 1)
        os.dup2(output_fd, 2)
        os.close(output_fd)
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv[:] = request["argv"]
        os.chdir(request["cwd"])
        sys.path.remove(str(Path(__file__).parent))
        sys.path[:0] = request["paths"]
        exec(compile(request["script"], "<string>", "exec"), {"__name__": "__main__"})
        return
    os.close(output_fd)
    with socket.socket(fileno=news_fd) as news:
        news.sendall(str(pid).encode())
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        with suppress(OSError):
            news.sendall(str(code).encode())
            news.recv(1)
    os.waitpid(pid, 0)  # the pid may be reused from now on
    os._exit(0)
