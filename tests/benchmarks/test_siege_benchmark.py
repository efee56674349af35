"""The benchmark of sieges measures each of them, and its exit status is the verdict."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_siege_is_measured_and_judged() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "siege.py", "--seconds", "0.5", "--only", "half a header"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    siege = next(line for line in lines if line.startswith("half a header")).split()
    assert len(siege) == 10
    assert int(siege[4]) < 64, "descriptors"
    judged = [line.split()[-1] for line in lines[lines.index("must reach") + 2 :]]
    assert len(judged) == 5
    assert done.returncode == (0 if set(judged) == {"yes"} else 1), done.stderr
