"""Runs a scenario: ``python scenario.py FILE MODELS VOICE``. Processes that it spawns import this file alone."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    file = sys.argv.pop(1)
    exec(compile(Path(file).read_text(encoding="utf-8"), file, "exec"))
