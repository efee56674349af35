"""What the launcher prints, in the language of the terminal, and the programs that it runs."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..errors import ResidencyError
from ..sentences import language


class LaunchError(ResidencyError):
    """Ends the launcher with exit code 1 and says what to do next."""

    def __init__(self, en: str, zh: str) -> None:
        super().__init__(en, zh, en, zh)


def choose(en: str, zh: str) -> str:
    """The one of the terminal's language."""
    return zh if language() == "zh" else en


def say(en: str, zh: str) -> None:
    """Print a line at once, so that it stands before the lines of programs that are run next."""
    print(choose(en, zh), flush=True)


def warn(en: str, zh: str) -> None:
    """Print a line to stderr."""
    print(choose(en, zh), file=sys.stderr, flush=True)


def fail(en: str, zh: str) -> NoReturn:
    """Raise `LaunchError`."""
    raise LaunchError(en, zh)


def report(error: ResidencyError) -> None:
    """Print an error to stderr."""
    warn(f"❌ {error.en}", f"❌ {error.zh}")


def quoted(words: Sequence[str]) -> str:
    """A command as it can be typed into a shell, whatever the language of the terminal."""
    return " ".join(
        shlex.quote(word) if not word or "\n" in word else re.sub(r"[^\w@%+=:,./-]", r"\\\g<0>", word) for word in words
    )


def output_of(*command: str) -> str | None:
    """What a program prints, without the last end of line; None if it is missing or fails. Its errors are not shown."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, errors="replace")
    except OSError:
        return None
    return None if done.returncode else done.stdout.rstrip("\n")


def become(command: list[str]) -> NoReturn:
    """Run a program in the place of this process: it has its number, its terminal and its signals."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and the program would inherit that
    sys.stdout.flush()
    os.execvp(command[0], command)
