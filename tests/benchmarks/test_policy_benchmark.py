"""The replay counts what it says, and the policy that learns is not above the curve of the fixed timeouts."""

from __future__ import annotations

import sys

import pytest

from benchmarks import policy as benchmark
from benchmarks._traces import DAY_S, TRACES, trace
from benchmarks.policy import OFFLOAD_S, RESTORE_S, SERVICE_S, Distance, Outcome, on_curve, replay
from residency.scheduling.policies import NEVER, FixedPolicy

AHEAD = ((0.0, 0.0), (90.0, 110.0))


@pytest.mark.parametrize(
    ("windows", "idle_s", "held_s", "ready_s"),
    [(((0.0, 30.0),), 20.0, 20.0, 0.0),
     (((0.0, 30.0),), 50.0, 30 + OFFLOAD_S + RESTORE_S, 50 + RESTORE_S),
     (((0.0, 30.0),), 30.1, 30 + OFFLOAD_S + RESTORE_S, 30 + OFFLOAD_S + RESTORE_S),
     (AHEAD, 50.0, OFFLOAD_S + RESTORE_S, 50 + RESTORE_S),
     (AHEAD, 90.1, OFFLOAD_S + RESTORE_S, 90 + RESTORE_S),
     (AHEAD, 100.0, OFFLOAD_S + 10, 90 + RESTORE_S),
     (AHEAD, 500.0, OFFLOAD_S + 20 + OFFLOAD_S + RESTORE_S, 500 + RESTORE_S)],
    ids=["warm", "gone", "leaving", "before the window", "coming back", "in the window", "after the window"],
)  # fmt: skip
def test_one_gap(windows: tuple[tuple[float, float], ...], idle_s: float, held_s: float, ready_s: float) -> None:
    assert benchmark.idle(idle_s, windows) == (pytest.approx(held_s), pytest.approx(ready_s))


def test_a_request_that_waits_for_another_neither_is_delayed_nor_ends_a_gap() -> None:
    assert replay([100.0, 101.0, 102.0], FixedPolicy(0, NEVER)) == Outcome(pytest.approx(OFFLOAD_S + RESTORE_S), 1)
    late_s = 100.0 + RESTORE_S + 3 * SERVICE_S
    assert replay([100.0, 101.0, 102.0, late_s + 10], FixedPolicy(20, NEVER)).gpu_s == pytest.approx(
        20 + OFFLOAD_S + RESTORE_S + 10
    )


def test_the_curve_is_straight_between_neighbours_and_ends_where_they_end() -> None:
    points = [Outcome(10.0, 100), Outcome(20.0, 50), Outcome(20.0, 50), Outcome(40.0, 0)]
    assert [on_curve(points, gpu_s) for gpu_s in (0, 10, 15, 20, 30, 40, 99)] == [100, 100, 75, 50, 25, 0, 0]


def test_a_distance_is_above_only_beyond_its_noise() -> None:
    assert not Distance.of([0.5, -0.3, 0.4, -0.2]).above
    assert Distance.of([0.5, 0.4, 0.5, 0.6]).verdict == "ABOVE by 0.50"
    assert Distance.of([-0.5, -0.4, -0.5, -0.6]).verdict == "below the curve"
    assert Distance.of([0.0]).verdict == "on the curve"


@pytest.mark.parametrize("name", TRACES)
def test_traces_are_in_order_and_the_same_for_the_same_seed(name: str) -> None:
    arrivals = trace(name, 0, 1)
    assert arrivals == sorted(arrivals) == trace(name, 0, 1) != trace(name, 1, 1)
    assert len(arrivals) > 50
    assert 0 < arrivals[0] < arrivals[-1] < DAY_S


@pytest.mark.parametrize("name", TRACES)
def test_auto_is_on_or_below_the_curve(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    distances = benchmark.compare(name, seeds=3, days=4, weights=(60.0, 600.0))
    assert not any(distance.above for distance in distances.values()), capsys.readouterr().out
    if name in ("steady", "bursty"):
        assert distances[60.0, NEVER].mean < -3, "a habit was there to be learned"
    if name == "daily":
        assert distances[600.0, NEVER].mean < -3, "busy and quiet hours were there to be told apart"


def test_the_exit_status_says_whether_it_is_above(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["policy.py", "--seeds", "2", "--days", "1", "--wait-weight", "10"])
    assert benchmark.main() == 0
    assert capsys.readouterr().out.count("auto, wait weight 10,") == 2 * len(TRACES)

    class AlwaysTooEarly(FixedPolicy):
        """Pays for a window that no request comes in."""

        def __init__(self, idle_timeout_s: float, *, wait_weight: float) -> None:
            super().__init__(0.0, idle_timeout_s)

        def windows(self) -> tuple[tuple[float, float], ...]:
            return ((0.0, 0.0), (0.1, 0.7), (1.1, 1.7))

    monkeypatch.setattr(benchmark, "AdaptivePolicy", AlwaysTooEarly)
    assert benchmark.main() == 1
    assert "ABOVE by" in capsys.readouterr().out
