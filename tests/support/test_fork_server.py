"""A forked program behaves like one in a fresh interpreter."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
from fork_server import ForkedProcess


def forked(script: str, *arguments: str, **env: str) -> ForkedProcess:
    return ForkedProcess(script, arguments, {"PATH": os.environ["PATH"], **env})


def test_it_has_its_own_arguments_environment_number_and_output() -> None:
    script = (
        "import os, sys; print(sys.argv, os.getpid(), os.environ.get('MINE'), __name__); print('2', file=sys.stderr)"
    )
    process = forked(script, "--flag", MINE="yes")
    assert process.wait(60) == 0
    assert process.stdout.read() == f"['-c', '--flag'] {process.pid} yes __main__\n2\n"
    assert "MINE" not in os.environ
    assert process.pid != os.getpid()


@pytest.mark.parametrize(
    ("script", "code"),
    [("", 0), ("raise SystemExit(3)", 3), ("import os; os._exit(4)", 4), ("1 / 0", 1), ("raise SystemExit('no')", 1)],
)
def test_its_exit_code_is_known(script: str, code: int) -> None:
    process = forked(script)
    assert process.wait(60) == process.poll() == code


def test_it_ends_as_the_interpreter_ends() -> None:
    script = (
        "import atexit, threading; atexit.register(print, 'last'); threading.Thread(target=print, args=['t']).start()"
    )
    process = forked(script)
    assert process.wait(60) == 0
    assert process.stdout.read() == "t\nlast\n"


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, -15), (signal.SIGKILL, -9), (signal.SIGINT, -2)])
def test_signals_do_to_it_what_they_do_by_default(sign: signal.Signals, code: int) -> None:
    process = forked("import signal; print('ready', flush=True); signal.pause()")
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0)
    process.send_signal(sign)
    assert process.wait(60) == code
    process.send_signal(signal.SIGTERM)  # without a receiver
    assert ("KeyboardInterrupt" in process.stdout.read()) == (sign == signal.SIGINT)


def test_gradio_is_imported_once_for_all() -> None:
    script = "import sys; print('gradio' in sys.modules, 'torch' in sys.modules)"
    both = [forked(script) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert [process.stdout.read() for process in both] == ["True True\n"] * 2
