"""The benchmark of shared cards runs all variants, and its exit status is the verdict."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sharing import Result

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a card shared by processes (Linux)")


@pytest.mark.parametrize(("chaos", "variants", "goals"), [([], 4, 5), (["--chaos"], 1, 4)])
def test_variants_are_measured_and_judged(chaos: list[str], variants: int, goals: int) -> None:
    command = [sys.executable, "benchmarks/sharing.py", "--requests", "12", "--idle-seconds", "0.5", *chaos]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    lines = done.stdout.splitlines()
    rows = [line for line in lines if line.startswith(("sharing,", "alone,"))]
    assert len(rows) == 2 * variants
    assert sum(int(number) for number in rows[0].split()[4:9]) == 12, "each request has one end"
    verdicts = [line.split()[-1] for line in lines if line.endswith(("  yes", "  no"))]
    assert len(verdicts) == goals
    assert done.returncode == (0 if set(verdicts) == {"yes"} else 1), done.stderr


def test_a_visit_during_a_stop_is_not_judged() -> None:
    visits: list[tuple[float, float, float | None]] = [(0.0, 1.0, 1.0), (2.0, 5.0, 3.0), (6.0, 16.0, None)]
    assert Result("", visits=visits, stops=[(1.5, 2.5)]).judged() == [1.0, float("inf")]
