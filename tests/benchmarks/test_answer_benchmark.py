"""The benchmark of answers measures each row on any machine, and its exit status is the verdict."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_row_is_measured_and_judged() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "answer.py", "--mb", "96", "--rounds", "1", "--requests", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    rows = {line[:34].strip(): line.split()[-1] for line in done.stdout.splitlines()[3:]}
    assert set(rows) == {"clone, first request", "clone", "lease", "offload"}, done.stderr
    judged = {answer for name, answer in rows.items() if name != "offload"}
    assert done.returncode == (1 if "no" in judged else 0)
