"""The benchmark runs on any machine, says something in every row, and leaves nothing behind. Never how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import _disk, _files, _goals, _moves
from benchmarks._material import Plan

ROOT = Path(__file__).resolve().parent.parent.parent
MB = 1 << 20


@pytest.mark.parametrize("device", ["simulated", "cpu"])
def test_every_row_is_printed_and_no_file_left(device: str, tmp_path: Path) -> None:
    folder, report = tmp_path / "files", tmp_path / "report.json"
    folder.mkdir()
    command = [sys.executable, ROOT / "benchmarks" / "restore.py", "--size", "4MB", "--tensors", "8", "--repeat", "1"]
    command += ["--small-tensors", "200", "--device", device, "--folder", folder, "--json", report]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())

    plan = Plan(4 * MB, 8, 200, device, str(folder))
    expected = [name for job in [*_moves.jobs(plan), *_disk.jobs(plan)] for name in job.names]
    expected += [_files.WRITTEN, *(goal.name for goal in _goals.goals(plan))]
    printed = done.stdout.splitlines()
    assert not [name for name in expected if not any(line.startswith(f"{name} ") for line in printed)]
    assert "failed:" not in done.stdout
    assert "None" not in done.stdout

    results = json.loads(report.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in results["moves"] + results["disk"]}
    if device == "simulated":
        assert rows[_moves.RESTORE]["device_peak"] == rows[_moves.RESTORE]["bytes"]
        assert rows[_moves.UNCHANGED]["allocated_after"] == 0
        assert rows[_disk.READY]["seconds"] > rows[_disk.READ]["seconds"]
    else:
        assert "one memory" in rows[_moves.RESTORE]["reason"]
    assert rows[_disk.RAW_FRESH]["bytes"] >= 3 * MB
    assert {goal["answer"] for goal in results["must_reach"]} <= {"yes", "no", "needs CUDA", "not measured"}
