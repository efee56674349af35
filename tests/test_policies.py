from __future__ import annotations

import math

import pytest

from residency.errors import InvalidInput
from residency.policies import FixedPolicy, change_policy, check_counts, make_policy, seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [(0, 0), (90, 90), (1.5, 1.5), ("90", 90), ("90s", 90), ("15m", 900), ("1h", 3600), (" 2H ", 7200), ("0.5m", 30),
     (-1, math.inf), ("-1", math.inf), ("-1.0", math.inf), (math.inf, math.inf)],
)  # fmt: skip
def test_durations(text: float | str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "-2", -5, "1d", "1m30s", "nan", math.nan, "1e3x", "--1", "-1m", None])
def test_what_is_no_duration_says_what_would_be(text: object) -> None:
    with pytest.raises(InvalidInput, match=r"15m.*-1 means never"):
        seconds(text)


@pytest.mark.parametrize("value", ["100001h", "9" * 30, 1e12])
def test_what_is_too_long_says_what_is_not(value: object) -> None:
    with pytest.raises(InvalidInput, match="at most 100000h, or -1 for never"):
        seconds(value)  # type: ignore[arg-type]
    assert seconds("100000h") == 3.6e8


def test_a_fixed_policy_has_one_window_and_learns_nothing() -> None:
    policy = make_policy("30s", -1)
    assert (policy.name, policy.keep_warm_s, policy.idle_timeout_s) == ("fixed", 30, math.inf)
    policy.idle_ended(5)
    policy.brought_back(5)
    assert policy.windows() == ((0.0, 30.0),)
    assert policy == FixedPolicy(30.0, math.inf)


def test_auto_is_a_policy_that_learns() -> None:
    policy = make_policy("auto", "1h")
    assert (policy.name, policy.keep_warm_s, policy.idle_timeout_s) == ("auto", 0, 3600)


@pytest.mark.parametrize("settings", [("sometimes", 600), (0, "auto"), (None, 600), (0, None)])
def test_a_policy_of_no_duration_is_refused(settings: tuple) -> None:
    with pytest.raises(InvalidInput):
        make_policy(*settings)


def test_changing_one_setting_leaves_the_other() -> None:
    policy = make_policy(10, 100)
    assert change_policy(policy, "1m", None) == FixedPolicy(60, 100)
    assert change_policy(policy, None, "1m") == FixedPolicy(10, 60)
    assert change_policy(policy, 0, -1) == FixedPolicy(0, math.inf)
    assert change_policy(policy, "auto", None).name == "auto"
    assert change_policy(policy, "auto", None).idle_timeout_s == 100
    assert change_policy(make_policy("auto", 100), 5, None) == FixedPolicy(5, 100)


@pytest.mark.parametrize("keep_warm", [None, "auto"])
def test_what_auto_has_learned_outlives_a_change_of_the_idle_timeout(keep_warm: str | None) -> None:
    learned = make_policy("auto", 600)
    learned.brought_back(1.0)
    for _ in range(50):
        learned.idle_ended(5.0)
    assert learned.keep_warm_s >= 5
    changed = change_policy(learned, keep_warm, 3600)
    assert changed.idle_timeout_s == 3600
    assert changed.keep_warm_s >= 5
    assert learned.idle_timeout_s == 600
    assert change_policy(learned, keep_warm, 2).keep_warm_s <= 2


@pytest.mark.parametrize("value", [None, 1, 12 << 30])
def test_a_count_is_a_whole_number_or_nothing(value: int | None) -> None:
    check_counts(1, size_bytes=value)


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", True])
def test_what_is_no_count_is_said_in_both_languages(value: object) -> None:
    with pytest.raises(InvalidInput) as raised:
        check_counts(1, size_bytes=value)
    assert str(raised.value) == (
        f"size_bytes={value!r} is no whole number from 1 on: give one, or None / "
        f"size_bytes={value!r} 不是 1 以上的整数：请给出整数或 None"
    )


def test_what_is_no_time_is_said_in_both_languages() -> None:
    with pytest.raises(InvalidInput, match=r"'soon' .*'soon' 不是有效的时长"):
        seconds("soon")
