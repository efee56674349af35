"""Output of the launcher in the language of the terminal, and calls of programs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from typing import NoReturn

from ..errors import ResidencyError
from ..sentences import language


class LaunchError(ResidencyError):
    """Error of the launcher, exit code 1."""


def choose(en: str, zh: str) -> str:
    """Returns the text in the terminal's language."""
    return zh if language() == "zh" else en


def say(en: str, zh: str) -> None:
    """Prints a line and flushes, so that it precedes the output of programs run next."""
    print(choose(en, zh), flush=True)


def warn(en: str, zh: str) -> None:
    """Prints a line to stderr."""
    print(choose(en, zh), file=sys.stderr, flush=True)


def fail(en: str, zh: str) -> NoReturn:
    raise LaunchError(en, zh)


def report(error: ResidencyError) -> None:
    warn(f"❌ {error.en}", f"❌ {error.zh}")


def output_of(*command: str) -> str | None:
    """Runs a program, without its stderr; returns its stripped output, or None if it is missing or fails."""
    import subprocess

    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, errors="replace")
    except OSError:
        return None
    return None if done.returncode else done.stdout.rstrip("\n")


def become(command: list[str], environ: Mapping[str, str] = os.environ) -> NoReturn:
    """Replaces this process by a program, which keeps pid, terminal and signals."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ignored by Python; the program would inherit that
    sys.stdout.flush()
    os.execvpe(command[0], command, environ)
