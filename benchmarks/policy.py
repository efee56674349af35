"""Compares cost and benefit of keep-warm: fixed timeouts, and the adaptive policy (auto).

    python benchmarks/policy.py
    python benchmarks/policy.py --seeds 20 --days 30 --wait-weight 120

Replays four kinds of traces (steady, bursty, daily, random) without a clock or a device, so that results are the same
on every machine. GPU-seconds: time in which the device holds an idle model's weights, warm or in a move; the requests'
own seconds, equal for all policies, are excluded. Delayed: a request that does not find all weights on the device, even
if they are in a move. All numbers are means over the seeds. auto is replayed with the app's idle timeout, after which
it plans no moves (the weights are released from main memory), and without one; fixed timeouts have none, which allows
longer stays.

The fixed timeouts form a curve: more GPU-seconds, fewer delays. "against the curve" is the distance of auto above (+)
or below (-) the curve at its own GPU-seconds, in percent of all requests, with the standard error over the seeds. The
curve is linear between neighbours, which corresponds to a random choice of both. On a random trace, all policies that
are off or on from the start are on one straight line, since the next arrival is unpredictable: any distance is noise.

Exits with 1 if auto is above the curve of any trace by more than two standard errors and 0.01 % of the requests.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._traces import DAY_S, TRACES, trace
from residency.contracts import Policy
from residency.scheduling.adaptive import AdaptivePolicy
from residency.scheduling.policies import NEVER, FixedPolicy

KEEP_WARM_S = (0, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, NEVER)
WAIT_WEIGHTS = (10.0, 60.0, 600.0)
IDLE_TIMEOUTS_S = (600, NEVER)
SERVICE_S, RESTORE_S, OFFLOAD_S = 4.0, 0.5, 0.3
NOISE, RESOLUTION = 2.0, 0.01
"""Tolerance of the curve: standard errors, and percent (the printed resolution)."""


@dataclass(frozen=True)
class Outcome:
    """Result of one policy on one trace: GPU-seconds of an idle model, and requests that waited for weights."""

    gpu_s: float
    delayed: int


@dataclass(frozen=True)
class Distance:
    """Distance above the curve, in percent of all requests: mean and standard error over the seeds."""

    mean: float
    error: float

    @classmethod
    def of(cls, percents: Sequence[float]) -> Distance:
        error = statistics.stdev(percents) / math.sqrt(len(percents)) if len(percents) > 1 else 0.0
        return cls(statistics.fmean(percents), error)

    @property
    def above(self) -> bool:
        return self.mean > self._noise

    @property
    def verdict(self) -> str:
        if self.above:
            return f"ABOVE by {self.mean:.2f}"
        return "below the curve" if self.mean < -self._noise else "on the curve"

    @property
    def _noise(self) -> float:
        return NOISE * self.error + RESOLUTION


def replay(arrivals: Sequence[float], policy: Policy) -> Outcome:
    """Serves the arrivals one after another; between them, follows the policy."""
    gpu_s, delayed, end_s = 0.0, 0, 0.0
    for arrival_s in arrivals:
        idle_s = arrival_s - end_s
        if idle_s <= 0:  # it waited for another request; the weights are on the device
            end_s += SERVICE_S
            continue
        held_s, ready_s = idle(idle_s, policy.windows())
        gpu_s += held_s
        if ready_s > idle_s:
            delayed += 1
            policy.brought_back(RESTORE_S)
        policy.idle_ended(idle_s)
        end_s += max(idle_s, ready_s) + SERVICE_S
    return Outcome(gpu_s, delayed)


def idle(idle_s: float, windows: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Returns seconds of device use in an idle gap, and the time of ready weights after the gap's beginning."""
    held_s = ready_s = gone_s = 0.0
    for from_s, until_s in windows:
        if from_s > 0:
            if idle_s < from_s:
                break
            ready_s = max(from_s, gone_s) + RESTORE_S
        if idle_s <= until_s:
            return held_s + max(idle_s, ready_s) - from_s, ready_s
        held_s += until_s - from_s + OFFLOAD_S
        gone_s = until_s + OFFLOAD_S
    # A running move is finished first, as in the manager.
    return held_s + RESTORE_S, max(idle_s, gone_s) + RESTORE_S


def on_curve(points: Sequence[Outcome], gpu_s: float) -> float:
    """Returns delayed requests of the fixed timeouts (in order) at these GPU-seconds."""
    for left, right in pairwise(points):
        if left.gpu_s <= gpu_s <= right.gpu_s and left.gpu_s < right.gpu_s:
            share = (gpu_s - left.gpu_s) / (right.gpu_s - left.gpu_s)
            return left.delayed + share * (right.delayed - left.delayed)
    return points[0].delayed if gpu_s < points[0].gpu_s else points[-1].delayed


def compare(name: str, seeds: int, days: float, weights: Sequence[float]) -> dict[tuple[float, float], Distance]:
    """Replays and prints one kind of trace; returns auto's distance from the curve, by wait weight and idle timeout."""
    traces = [trace(name, seed, days) for seed in range(seeds)]
    curves = [[replay(arrivals, FixedPolicy(keep_s, NEVER)) for keep_s in KEEP_WARM_S] for arrivals in traces]
    requests = statistics.fmean(map(len, traces))
    print(f"\n{name}: {requests:,.0f} requests in {days:g} days")
    print(f"{'keep warm':40}{'GPU-seconds':>12}{'of time':>9}{'delayed':>9}{'of all':>8}{'against the curve':>20}")

    def row(title: str, outcomes: Sequence[Outcome], rest: str = "") -> None:
        gpu_s = statistics.fmean(outcome.gpu_s for outcome in outcomes)
        delayed = statistics.fmean(outcome.delayed for outcome in outcomes)
        print(f"{title:40}{gpu_s:12,.0f}{gpu_s / (days * DAY_S):9.2%}{delayed:9,.0f}{delayed / requests:8.1%}{rest}")

    for index, keep_s in enumerate(KEEP_WARM_S):
        row("never leaves" if keep_s == NEVER else f"{keep_s} s", [curve[index] for curve in curves])
    distances = {}
    for weight, idle_timeout_s in product(weights, IDLE_TIMEOUTS_S):
        until = "no idle timeout" if idle_timeout_s == NEVER else f"released at {idle_timeout_s} s"
        outcomes = [replay(arrivals, AdaptivePolicy(idle_timeout_s, wait_weight=weight)) for arrivals in traces]
        distances[weight, idle_timeout_s] = distance = Distance.of([
            100.0 * (outcome.delayed - on_curve(curve, outcome.gpu_s)) / len(arrivals)
            for outcome, curve, arrivals in zip(outcomes, curves, traces, strict=True)
        ])  # fmt: skip
        row(
            f"auto, wait weight {weight:g}, {until}",
            outcomes,
            f"{distance.mean:+11.2f} +- {distance.error:4.2f}  {distance.verdict}",
        )
    return distances


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="traces of each kind (8)")
    parser.add_argument("--days", type=float, default=10.0, help="length of each trace (10)")
    parser.add_argument(
        "--wait-weight", type=float, action="append", metavar="W",
        help="seconds of an idle model on the device that a second of waiting is worth; may be repeated (10, 60, 600)",
    )  # fmt: skip
    options = parser.parse_args()
    if options.seeds < 1 or not 0 < options.days < math.inf:
        parser.error("at least one seed and more than 0 days")
    weights = options.wait_weight or WAIT_WEIGHTS
    chosen = "".join(f" --wait-weight {weight:g}" for weight in weights)
    print(f"python benchmarks/policy.py --seeds {options.seeds} --days {options.days:g}{chosen}")
    print(f"A request takes {SERVICE_S} s, a restore {RESTORE_S} s, an offload {OFFLOAD_S} s. Means over the seeds.")
    above = False
    for name in TRACES:
        distances = compare(name, options.seeds, options.days, weights)
        above |= any(distance.above for distance in distances.values())
    print(f"\nauto is {'ABOVE the curve somewhere' if above else 'on or below the curve on every trace'}")
    return int(above)


if __name__ == "__main__":
    sys.exit(main())
