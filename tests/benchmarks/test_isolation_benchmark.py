"""The benchmark of worker processes prints each row on any machine, and finds no leak."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from worker_engines import LINUX

from benchmarks import isolation

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = LINUX


def test_every_row_is_measured_and_nothing_leaks() -> None:
    few = ["--cycles", "5", "--managers", "1", "--rounds", "1", "--mb", "16", "--seed", "3", "--kill", "0.5"]
    command = [sys.executable, ROOT / "benchmarks" / "isolation.py", *few]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.stdout.count("<=") == 4, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.endswith("no leak")]
    assert len(rows) == 7, done.stdout
    assert "\nkilled: " in done.stdout
    assert "1 managers killed" in done.stdout
    assert done.returncode == (1 if "  no\n" in done.stdout else 0)


def test_checkpoints_of_the_cycles_go_through_the_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CHECKPOINTS", "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    others = set(psutil.Process().children(recursive=True))
    with isolation.with_helper(tmp_path) as tts:
        with tts.lease():
            assert tts.manager.device.memory().process_bytes > 400 << 20
        tts.force_offload()
        assert tts.manager.device.memory().process_bytes == 0
        ours = set(psutil.Process().children(recursive=True)) - others
        kinds = [isolation.kind_of(process) for process in ours]
        assert sorted(kinds) == ["fork-server", "guard", "helper", "worker"]
        tts.clone("", "", "")
