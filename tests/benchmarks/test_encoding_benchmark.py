"""The benchmark of encoders has a row for each format and text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from residency.web.speech.encoding import MEDIA_TYPES

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_format_and_text_is_measured() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "encoding.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line]
    formats = [row for row in rows if row[0] in MEDIA_TYPES]
    assert len(formats) == 2 * len(MEDIA_TYPES)
    assert all(int(row[2]) < 6000 for row in formats), "samples until the first sound"
    assert len(rows) == 3 + len(formats) + 5
