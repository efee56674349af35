from __future__ import annotations

import math

import pytest

from residency.errors import InvalidInput
from residency.policies import seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [(0, 0), (90, 90), (1.5, 1.5), ("90", 90), ("90s", 90), ("15m", 900), ("1h", 3600), (" 2H ", 7200), ("0.5m", 30),
     (-1, math.inf), ("-1", math.inf), (math.inf, math.inf)],
)  # fmt: skip
def test_durations(text: float | str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "-2", -5, "1d", "1m30s", "nan", math.nan, "1e3x", "--1", "-1m", None])
def test_what_is_no_duration_says_what_would_be(text: object) -> None:
    with pytest.raises(InvalidInput, match=r"15m.*-1 means never"):
        seconds(text)
