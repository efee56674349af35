from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from residency.contracts import Policy
from residency.errors import InvalidInput
from residency.scheduling.adaptive import AdaptivePolicy
from residency.scheduling.policies import (
    FixedPolicy,
    change_policy,
    check_counts,
    keep_alive_seconds,
    make_policy,
    policy_for,
    seconds,
)


@dataclass
class Own:
    """A policy that is neither of ours; it raises in the method that it is told to."""

    idle_timeout_s: float = 100.0
    spans: Any = ((0.0, 5.0),)
    fails_in: str = ""
    learned: list[float] = field(default_factory=list)
    name: str = "own"
    keep_warm_s: float = 5.0

    def _or_fail(self, method: str, answer: Any) -> Any:
        if method == self.fails_in:
            raise ZeroDivisionError(method)
        return answer

    def windows(self) -> tuple[tuple[float, float], ...]:
        return self._or_fail("windows", self.spans)

    def idle_ended(self, idle_s: float) -> None:
        self._or_fail("idle_ended", self.learned.append(idle_s))

    def brought_back(self, seconds: float) -> None:
        self._or_fail("brought_back", self.learned.append(seconds))

    def with_idle_timeout(self, idle_timeout_s: float) -> Policy:
        return self._or_fail("with_idle_timeout", replace(self, idle_timeout_s=idle_timeout_s))


def use_all(policy: Policy) -> tuple:
    policy.idle_ended(3)
    policy.brought_back(4)
    policy.with_idle_timeout(50)
    return policy.name, policy.windows(), policy.keep_warm_s, policy.idle_timeout_s


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


@pytest.mark.parametrize("value", ["100001h", "9" * 30, 1e12, 1.5e307])
def test_what_is_too_long_says_what_is_not(value: object) -> None:
    with pytest.raises(InvalidInput, match="at most 100000h, or -1 for never"):
        seconds(value)  # type: ignore[arg-type]
    assert seconds("100000h") == 3.6e8


@pytest.mark.parametrize(
    ("value", "expected"),
    [("5m", 300), ("24h", 86400), ("1h30m", 5400), ("1h30m5.5s", 5405.5), ("300ms", 0.3), ("10us", 1e-5),
     ("10µs", 1e-5), ("10μs", 1e-5), ("10ns", 1e-8), (" 2H ", 7200), (".5s", 0.5), ("1.s", 1), ("+5m", 300),
     (0, 0), ("0", 0), ("-0", 0), (90, 90), (2.5, 2.5), ("90", 90), ("2.5", 2.5), (-1, math.inf), (-0.5, math.inf),
     ("-1", math.inf), ("-1m", math.inf), ("-1.5h2s", math.inf), (-(10**400), math.inf), (math.inf, math.inf),
     ("100000h", 3.6e8)],
)  # fmt: skip
def test_what_ollama_takes_as_keep_alive(value: float | str, expected: float) -> None:
    parsed = keep_alive_seconds(value)
    assert parsed == pytest.approx(expected)
    assert math.copysign(1, parsed) == 1
    assert keep_alive_seconds(parsed) == parsed


@pytest.mark.parametrize(
    "value",
    ["", " ", "s", "-", ".", "soon", "1d", "5 m", "1m30", "1h-5m", "--1", "1e3", "inf", "nan", "٣s", math.nan, True,
     False, None, [], "1s" * 50_000 + "x"],
)  # fmt: skip
def test_what_is_no_keep_alive_says_what_would_be(value: Any) -> None:
    with pytest.raises(InvalidInput, match=r"1h30m; 0: leave at once; -1: until") as caught:
        keep_alive_seconds(value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", ["100001h", 1e12, 10**400, "9" * 5000, "99999h9999h"])
def test_a_keep_alive_of_centuries_is_a_mistake(value: Any) -> None:
    with pytest.raises(InvalidInput, match="at most 100000h, or -1 for no limit"):
        keep_alive_seconds(value)


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


def test_a_policy_of_ones_own_is_asked_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    own = Own()
    assert use_all(policy_for(own, None, None, {})) == ("own", ((0.0, 5.0),), 5, 100)
    assert own.learned == [3, 4]
    assert caplog.records == []


def test_changing_the_idle_timeout_leaves_a_policy_of_ones_own_in_place_and_keep_warm_does_not() -> None:
    policy = policy_for(Own(), None, None, {})
    policy.idle_ended(3)
    assert change_policy(policy, None, None) is policy
    changed = change_policy(policy, None, "1h")
    assert (changed.name, changed.keep_warm_s, changed.idle_timeout_s) == ("own", 5, 3600)
    assert change_policy(policy, 7, None) == FixedPolicy(7, 100)
    assert change_policy(policy, "auto", None).name == "auto"


@pytest.mark.parametrize("fails_in", ["windows", "idle_ended", "brought_back", "with_idle_timeout"])
def test_a_policy_of_ones_own_that_raises_is_done_without(fails_in: str, caplog: pytest.LogCaptureFixture) -> None:
    policy = policy_for(Own(fails_in=fails_in), None, None, {})
    use_all(policy)
    assert use_all(policy) == ("fixed", ((0.0, 0.0),), 0, 600)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith("The policy Own(")
    assert record.getMessage().endswith(
        "FixedPolicy(keep_warm_s=0.0, idle_timeout_s=600.0, name='fixed') takes its place"
    )
    assert fails_in in str(record.exc_info[1])


@pytest.mark.parametrize(
    "spans", [(), None, ((1.0, 2.0),), ((0.0, 5.0), (3.0, 8.0)), ((0.0, math.nan),), ((0.0, 5.0), (8.0, 6.0))]
)
def test_windows_that_cannot_be_are_a_failure_of_the_policy(spans: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert policy_for(Own(spans=spans), None, None, {}).windows() == ((0.0, 0.0),)
    assert len(caplog.records) == 1


def test_what_is_no_keep_warm_says_that_it_can_be_for_ever_and_auto() -> None:
    with pytest.raises(InvalidInput, match=r"-1 means always; or auto, .*-1 表示始终保留；也可写 auto"):
        make_policy("soon", 600)


@pytest.mark.parametrize("time_s", [math.nan, -1.0])
def test_a_time_that_is_none_is_a_failure_of_the_policy(time_s: float) -> None:
    policy = policy_for(Own(idle_timeout_s=time_s), None, None, {})
    assert (policy.idle_timeout_s, policy.name) == (600, "fixed")


def test_a_policy_made_from_one_of_ours_is_guarded_too() -> None:
    class Fails(FixedPolicy):
        def windows(self) -> tuple[tuple[float, float], ...]:
            raise KeyError

    assert policy_for(Fails(), None, None, {}).windows() == ((0, 0),)


def test_times_that_cannot_be_are_a_failure_of_the_policy() -> None:
    assert policy_for(Own(idle_timeout_s="soon"), None, None, {}).idle_timeout_s == 600
    assert policy_for(replace(Own(), keep_warm_s=None), None, None, {}).keep_warm_s == 0


def test_auto_with_settings_of_ones_own_stays_auto() -> None:
    policy = AdaptivePolicy(600, wait_weight=5)
    assert policy_for(policy, None, None, {}) is policy


@pytest.mark.parametrize(("policy", "says"), [("auto", "use keep_warm"), (object(), "residency.contracts.Policy")])
def test_what_is_no_policy_is_refused(policy: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=rf"{says}.* / policy=.* 请用 keep_warm"):
        policy_for(policy, None, None, {})


@pytest.mark.parametrize("settings", [(0, None), (None, 600), ("auto", 0)])
def test_a_policy_and_times_contradict_each_other(settings: tuple) -> None:
    with pytest.raises(InvalidInput, match=r"leave those out / .*请不要同时给出"):
        policy_for(Own(), *settings, {})


@pytest.mark.parametrize("value", [None, 1, 12 << 30])
def test_a_count_is_a_whole_number_or_nothing(value: int | None) -> None:
    check_counts(1, size_bytes=value)


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", True])
def test_what_is_no_count_is_said_in_both_languages(value: object) -> None:
    with pytest.raises(InvalidInput) as raised:
        check_counts(1, size_bytes=value)
    assert str(raised.value) == (
        f"size_bytes={value!r} is not a whole number of at least 1: give one, or None / "
        f"size_bytes={value!r} 不是 1 以上的整数：请给出整数或 None"
    )


def test_what_is_no_time_is_said_in_both_languages() -> None:
    with pytest.raises(InvalidInput, match=r"'soon' .*'soon' 不是有效的时长"):
        seconds("soon")
