"""``app.py`` as a separate process, for tests from outside."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from fork_server import ROOT, ForkedProcess, default_signals

START_WITHIN_S = 180
_LOOK_EVERY_S = 0.01

# Replaces the built-in engine and the recognizer by ones that print their steps and wait at the test's gates.
_WITH_GATES = """
import pathlib, sys, types
sys.path.insert(0, "tests/support")
import gated_engine
gated_engine.FOLDER = pathlib.Path({folder!r})
sys.modules["residency.engines.builtin"] = sys.modules["residency.engines.asr"] = gated_engine
"""

# Runs app.py; SIGUSR1 prints the names of its threads, SIGUSR2 those of its modules. A thread waits for the signals: a
# handler runs in the main thread, late if the signal arrives just before that thread starts to wait.
_WITH_ROLL_CALL = """
import runpy, signal, sys, threading
answers = {
    signal.SIGUSR1: lambda: print("threads:", *sorted(t.name for t in threading.enumerate()), flush=True),
    signal.SIGUSR2: lambda: print("modules:", *sorted(sys.modules), flush=True),
    signal.SIGALRM: lambda: print(on_alarm(), flush=True),
}
signal.pthread_sigmask(signal.SIG_BLOCK, answers)
def answer():
    while True:
        answers[signal.sigwait(answers)]()
threading.Thread(target=answer, name="signals-of-the-test", daemon=True).start()
sys.argv[0] = "app.py"
runpy.run_path("app.py", run_name="__main__")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environ() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def wait_until(condition: Callable[[], bool]) -> bool:
    """Polls the state of another process until ``condition`` is true; returns False after 90 s."""
    until_s = time.monotonic() + 90
    while not (so := condition()) and time.monotonic() < until_s:
        time.sleep(_LOOK_EVERY_S)  # leaves the core to the other process
    return so


def run_app(*arguments: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    """Runs ``app.py`` in cases where it exits by itself."""
    return subprocess.run(
        [sys.executable, "app.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, **keywords
    )


class RunningApp:
    """A served app, until the block ends. ``log`` is its output so far.

    With ``gates``, an empty folder, the engine is a `gated_engine`. ``prelude`` runs before the app. If it defines
    ``on_alarm``, each SIGALRM prints what that function returns.
    """

    def __init__(
        self, tmp_dir: Path, *arguments: str, gates: Path | None = None, prelude: str = "", port: int | None = None
    ) -> None:
        prelude = ("" if gates is None else _WITH_GATES.format(folder=str(gates))) + prelude
        self.tmp_dir = tmp_dir
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.managed = "--enable-gpu-management" in arguments
        self._lines: list[str] = []
        self._news = threading.Condition()
        where = ("--server-name", "127.0.0.1", "--server-port", str(self.port), "--tmp-dir", str(tmp_dir))
        self.process = self._start(prelude + _WITH_ROLL_CALL, *where, *arguments)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _start(self, script: str, *arguments: str) -> subprocess.Popen[str] | ForkedProcess:
        """Starts a new interpreter, as users do."""
        return subprocess.Popen(
            [sys.executable, "-c", script, *arguments], cwd=ROOT, env=_environ(), preexec_fn=default_signals,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def __enter__(self) -> RunningApp:
        try:
            self.wait_for_line("Serving on", START_WITHIN_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()

    @property
    def log(self) -> str:
        return "".join(self._lines)

    def forget_log(self) -> None:
        """Clears the log, for the next test with the same app."""
        with self._news:
            self._lines.clear()

    def wait_for_line(self, part: str, timeout_s: float = 90) -> str:
        """Returns the first line that contains ``part``."""
        with self._news:
            self._news.wait_for(lambda: self._find(part) or not self._reader.is_alive(), timeout_s)
            line = self._find(part)
        assert line, f"{part!r} is not in the log:\n{self.log}"
        return line

    def threads(self) -> str:
        self.process.send_signal(signal.SIGUSR1)
        return self.wait_for_line("threads:")

    def modules(self) -> set[str]:
        """Returns the names of the modules imported by the process at the first call."""
        self.process.send_signal(signal.SIGUSR2)
        return set(self.wait_for_line("modules:").split()[1:])

    def stop(self, sign: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal; returns the exit code."""
        self.process.send_signal(sign)
        return self.process.wait(timeout=90)

    def get(self, path: str) -> tuple[int, Any]:
        return self._call(Request(self.url + path))

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return self._call(Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}))

    def model(self) -> Any:
        """Returns the entry of ``tts`` in the status."""
        return self.get("/gpu/status")[1]["models"]["tts"]

    def _call(self, request: Request) -> tuple[int, Any]:
        try:
            with urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except HTTPError as error:
            return error.code, error.read().decode()

    def _find(self, part: str) -> str | None:
        return next((line for line in self._lines if part in line), None)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._news:
                self._lines.append(line)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()


class ForkedApp(RunningApp):
    """A served app that starts within a second, for tests that depend neither on its start nor on its imports."""

    def _start(self, script: str, *arguments: str) -> ForkedProcess:
        return ForkedProcess(script, arguments, _environ())
