"""The benchmark measures every row on any machine, and its exit status says whether the goals were reached."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks._cold import Cold
from benchmarks.overhead import Crowd, Times, judge

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_row_is_printed_and_the_exit_status_is_the_verdict(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, ROOT / "benchmarks" / "overhead.py", "--leases", "100", "--handovers", "25"]
    command += ["--rounds", "5", "--waiting", "1", "4", "--cold-share", "0.01", "--json", report]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    results = json.loads(report.read_text(encoding="utf-8"))
    reached = [goal["value"] <= goal["wanted"] for goal in results["must_reach"]]
    assert done.returncode == (0 if all(reached) else 1), done.stderr
    assert [row["waiting"] for row in results["waiting"]] == [1, 4]
    assert all(row["leave"] > 0 and row["handover"] > 0 for row in results["waiting"])
    names = [row["name"] for table in ("alone", "status", "cold", "must_reach") for row in results[table]]
    assert not [name for name in names if f"\n{name} " not in done.stdout]


def test_a_goal_that_is_missed_is_noticed() -> None:
    quick = Times("lease", 10, 11, 12, 13)
    away = Cold("a lot", first=2, later=0.1, wanted=0.15)
    few = Crowd(1, leave=10, leave_p99=10, queue_leave=5, handover=20, queue_handover=10, lock_handover=1)
    many = replace(few, waiting=64)
    for cold, missed in ((away, 0), (replace(away, later=0.2), 1), (replace(away, later=9, wanted=None), 0)):
        assert sum(not goal.reached for goal in judge([quick], [few, many], [quick], [cold])) == missed
    for alone, crowd, look, missed in (
        (quick, many, quick, 0),
        (replace(quick, median=26), many, quick, 1),
        (quick, replace(many, leave=16), quick, 1),
        (quick, replace(many, handover=40), quick, 1),
        (quick, replace(many, handover=40, queue_handover=20), quick, 0),
        (quick, many, replace(quick, p99=6000), 1),
    ):
        assert sum(not goal.reached for goal in judge([alone], [few, crowd], [look], [away])) == missed
