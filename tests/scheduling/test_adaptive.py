from __future__ import annotations

import math
import random
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residency.contracts import Policy
from residency.errors import InvalidInput
from residency.scheduling.adaptive import AdaptivePolicy

OFF_AT_ONCE = ((0.0, 0.0),)
RESTORE_S = 2.0

gaps_s = st.floats(0, 1e9) | st.sampled_from([0.0, 5e-324, 1e-3, 1.0, 600.0, 172_800.0, 1e300, math.inf])


def learned(idle_s: Iterable[float], restore_s: float = RESTORE_S, idle_timeout_s: float = math.inf) -> AdaptivePolicy:
    policy = AdaptivePolicy(idle_timeout_s)
    use(policy, idle_s, restore_s)
    return policy


def use(policy: AdaptivePolicy, idle_s: Iterable[float], restore_s: float = RESTORE_S) -> None:
    for gap_s in idle_s:
        policy.brought_back(restore_s)
        policy.idle_ended(gap_s)


def about(mean_s: float, count: int) -> list[float]:
    rng = random.Random(1)
    return [rng.gauss(mean_s, 0.02 * mean_s) for _ in range(count)]


def bursts(count: int) -> list[float]:
    """Of five requests with 5 to 25 s between them, an hour or more apart."""
    rng = random.Random(1)
    return [rng.uniform(5, 25) if index % 5 else 3600 + rng.expovariate(1 / 3600) for index in range(count)]


def warm_at(policy: Policy, idle_s: float) -> bool:
    return any(from_s <= idle_s <= until_s for from_s, until_s in policy.windows())


def test_it_is_a_policy() -> None:
    policy: Policy = AdaptivePolicy()
    assert (policy.name, policy.idle_timeout_s, policy.keep_warm_s) == ("auto", 600, 0)


def test_off_at_once_until_a_gap_and_a_restore_have_been_seen() -> None:
    assert AdaptivePolicy().windows() == OFF_AT_ONCE
    policy = AdaptivePolicy()
    policy.brought_back(RESTORE_S)
    assert policy.windows() == OFF_AT_ONCE
    policy = AdaptivePolicy()
    policy.idle_ended(5)
    assert policy.windows() == OFF_AT_ONCE


@pytest.mark.parametrize("habit_s", [60, 600, 7200])
def test_a_steady_habit_brings_the_weights_back_shortly_before_the_next_request(habit_s: float) -> None:
    policy = learned(about(habit_s, 30), restore_s=habit_s / 300)
    off, (from_s, until_s) = policy.windows()
    assert off[1] < 0.02 * habit_s
    assert 0.85 * habit_s < from_s < until_s < 1.15 * habit_s
    on_time = [from_s + habit_s / 300 <= gap_s <= until_s for gap_s in about(habit_s, 30)]
    assert sum(on_time) >= 28


def test_a_slower_restore_begins_earlier() -> None:
    quick, slow = learned(about(600, 30), 2.0), learned(about(600, 30), 20.0)
    assert slow.windows()[1][0] <= quick.windows()[1][0] - 18


def test_within_a_burst_it_stays_and_after_it_it_leaves() -> None:
    policy = learned(bursts(100))
    assert all(warm_at(policy, idle_s) for idle_s in range(7, 24))
    assert not any(warm_at(policy, idle_s) for idle_s in range(60, 7200, 20))


def test_while_little_is_known_it_stays_for_longer_than_what_it_has_seen() -> None:
    assert 25 < learned([5000.0, 10.0, 20.0, 15.0], restore_s=20.0).keep_warm_s < 100


def test_where_the_next_request_is_far_and_restores_are_cheap_it_leaves_at_once() -> None:
    rng = random.Random(1)
    assert learned((rng.expovariate(1 / 900) for _ in range(300)), restore_s=0.5).windows() == OFF_AT_ONCE


def test_waiting_that_is_worth_more_keeps_it_longer() -> None:
    rng = random.Random(1)
    gaps = [rng.lognormvariate(math.log(10), 1) for _ in range(200)]
    until_s = []
    for weight in (5.0, 50.0, 500.0):
        policy = AdaptivePolicy(math.inf, wait_weight=weight)
        use(policy, gaps, 0.5)
        until_s.append(policy.windows()[-1][1])
    assert until_s[0] < 2 < 15 < until_s[1] < until_s[2]


def test_nothing_is_promised_beyond_the_idle_timeout() -> None:
    assert len(learned(about(500, 30), idle_timeout_s=math.inf).windows()) == 2
    assert learned(about(500, 30), idle_timeout_s=400).windows()[-1][1] < 20


def test_a_few_gaps_of_similar_length_among_many_bring_nothing_back() -> None:
    rng = random.Random(1)
    gaps = [rng.expovariate(1 / 3600) for _ in range(60)]
    assert len(learned([*gaps, 2000, 2010, *gaps], restore_s=0.5).windows()) == 1


@pytest.mark.parametrize("before", [about(600, 300), about(20, 300), bursts(300)], ids=["10min", "20s", "bursts"])
def test_it_follows_a_change_of_habit_within_thirty_requests(before: list[float]) -> None:
    policy = learned([*before, *about(1800, 30)])
    assert warm_at(policy, 1800)
    assert not any(warm_at(policy, idle_s) for idle_s in range(30, 1600, 10))


def test_a_habit_long_gone_is_forgotten() -> None:
    policy = learned([*about(500, 2000), *about(900, 300)])
    assert warm_at(policy, 900)
    assert not warm_at(policy, 500)


def test_it_follows_from_rare_to_frequent_requests_within_fifteen() -> None:
    policy = learned([*about(600, 300), *about(15, 15)])
    assert all(warm_at(policy, idle_s) for idle_s in (14, 15, 16))


def test_a_busy_time_and_a_quiet_time_are_told_apart() -> None:
    day = [*about(40, 100), *about(1200, 20)]
    policy = learned(day * 3, restore_s=0.5)
    use(policy, about(1200, 10), restore_s=0.5)
    assert not warm_at(policy, 40)
    use(policy, about(40, 10), restore_s=0.5)
    assert warm_at(policy, 40)


def test_one_slow_restore_does_not_move_much() -> None:
    policy = learned(about(600, 30))
    before_s = policy.windows()[1][0]
    policy.brought_back(10 * RESTORE_S)
    assert before_s - 6 * RESTORE_S < policy.windows()[1][0] < before_s


def test_the_windows_are_the_same_object_until_there_is_something_new() -> None:
    policy = learned(about(600, 10))
    windows = policy.windows()
    assert policy.windows() is windows
    assert policy.keep_warm_s == windows[0][1]
    policy.idle_ended(5)
    assert policy.windows() is not windows
    windows = policy.windows()
    policy.brought_back(50)
    assert policy.windows() is not windows


@given(
    st.lists(gaps_s, max_size=30),
    st.floats(0, 1e4) | st.just(1e-9),
    st.sampled_from([0.0, 0.5, 1.0, 600.0, 1e5, math.inf]) | st.floats(0, 1e6),
    st.sampled_from([1e-6, 1.0, 3.0, 60.0, 1e4, 1e9]),
)
def test_windows_are_in_order_and_apart_begin_at_0_and_end_by_the_idle_timeout(
    gaps: list[float], restore_s: float, idle_timeout_s: float, wait_weight: float
) -> None:
    policy = AdaptivePolicy(idle_timeout_s, wait_weight=wait_weight)
    use(policy, gaps, restore_s)
    windows = policy.windows()
    assert windows[0][0] == 0
    assert all(from_s <= until_s for from_s, until_s in windows)
    assert all(left[1] < right[0] < right[1] for left, right in pairwise(windows))
    assert windows[-1][1] <= idle_timeout_s


@pytest.mark.parametrize("idle_timeout_s", [-1, -math.inf, math.nan])
def test_an_idle_timeout_that_cannot_be(idle_timeout_s: float) -> None:
    with pytest.raises(InvalidInput, match="idle timeout"):
        AdaptivePolicy(idle_timeout_s)


@pytest.mark.parametrize("wait_weight", [0, -60, math.inf, math.nan])
def test_a_wait_weight_that_cannot_be(wait_weight: float) -> None:
    with pytest.raises(InvalidInput, match="wait weight"):
        AdaptivePolicy(wait_weight=wait_weight)
