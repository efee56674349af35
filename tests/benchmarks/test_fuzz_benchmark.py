from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_one_upload_of_each_kind() -> None:
    command = [sys.executable, "benchmarks/fuzz.py", "--uploads", "12", "--cases", "0", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split() for line in done.stdout.splitlines()]
    assert ["good", "1", "0", "0"] in table
    assert ["zip", "bombs", "0", "1", "0"] in table
    assert "files that outlive their session: none" in done.stdout
    assert "served to the end; files left: none" in done.stdout
