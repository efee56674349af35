"""`scripts/test --quick` leaves out the right files."""

import re
from pathlib import Path

import pytest
from conftest import SLOW

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("place", SLOW)
def test_what_is_left_out_exists(place: str) -> None:
    assert (ROOT / place).exists(), "a file that was renamed would come back into the quick tests"


def test_files_that_start_apps_are_left_out() -> None:
    starting = {
        path.relative_to(ROOT)
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(
            r"^from (serving|starting) import .*(App|Project)\b", path.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    assert len(starting) > 5
    assert {path for path in starting if not any(path.is_relative_to(place) for place in SLOW)} == set()
