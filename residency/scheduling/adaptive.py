"""Learns from the gaps between requests when an idle model should be on the device. Pure: no clock, no locks.

A histogram policy as in "Serverless in the Wild" (Shahrad et al., USENIX ATC 2020) with three differences: windows
minimise cost (`_plan`) instead of using percentiles, predictions depend on the recent request rate, and a prior
replaces that paper's fallback for histograms with too few samples.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from ..errors import InvalidInput

#: Bins of idle gaps in seconds: [0, 1), then each 5 % longer, up to two days, and one for longer gaps. Narrow enough
#: for a period of ten minutes, and few enough for a new plan after every request.
_EDGES_S = (0.0, *(1.05**k for k in range(248)))
_WIDTHS_S = tuple(until_s - from_s for from_s, until_s in pairwise(_EDGES_S))
_LONGER = len(_WIDTHS_S)

#: The weight of a gap decays by this factor with each further one: about the last hundred gaps count.
_DECAY = 0.99
#: A uniform prior over the bins, with the weight of two gaps.
_PRIOR = 2.0 / (_LONGER + 1)
#: The level of recent gaps is an exponential mean of their logarithms with this step. Levels a factor of 4 apart are
#: different classes, so that a busy hour does not determine the night.
_LEVEL_STEP, _CLASS = 0.3, math.log(4.0)
#: The gaps of all classes have the weight of this many gaps of the current class.
_BORROWED = 10.0
#: A return must gain, beyond its cost, as much as this many gaps, so that a random cluster of gaps causes none.
_EVIDENCE = 3.0
#: A return begins this many restore times ahead, since restore times vary.
_LEAD = 1.2
#: Plan anew after this many gaps of less than a second.
_PLAN_AFTER = 30
_RESTORE_STEP = 0.2


class AdaptivePolicy:
    """A `Policy` that keeps the model on the device while the next request is likely enough.

    One second of a request's wait for the weights costs as much as ``wait_weight`` seconds of an idle model's stay on
    the device. With 60 and a restore of 0.5 s, the model stays while the next request is expected within about 30 s.
    """

    name = "auto"

    def __init__(self, idle_timeout_s: float = 600.0, *, wait_weight: float = 60.0) -> None:
        if not (idle_timeout_s >= 0 and 0 < wait_weight < math.inf):
            raise InvalidInput(
                f"The idle timeout must be 0 or more (math.inf: never) and the wait weight a finite number above 0, "
                f"not {idle_timeout_s!r} and {wait_weight!r}",
                f"空闲超时应为 0 或更大的值（math.inf 表示永不），等待权重应为大于 0 的有限数，"
                f"而不是 {idle_timeout_s!r} 和 {wait_weight!r}",
            )
        self.idle_timeout_s = idle_timeout_s
        self.wait_weight = wait_weight
        self._all = _GapHistogram()
        self._by_class: dict[int, _GapHistogram] = {}
        self._unplanned = 0
        self._level: float | None = None
        self._restore_s: float | None = None
        self._windows: tuple[tuple[float, float], ...] | None = None

    def with_idle_timeout(self, idle_timeout_s: float) -> AdaptivePolicy:
        """Returns a copy, with what was learned, and another idle timeout."""
        other = copy.deepcopy(self)
        other.idle_timeout_s, other._windows = idle_timeout_s, None
        return other

    @property
    def keep_warm_s(self) -> float:
        return self.windows()[0][1]

    def windows(self) -> tuple[tuple[float, float], ...]:
        """Computed once after new data. ``((0.0, 0.0),)``, no stay, before the first gap and the first restore."""
        if self._windows is None:
            self._windows, self._unplanned = self._computed(), 0
        return self._windows

    def idle_ended(self, idle_s: float) -> None:
        if self._level is not None:
            self._by_class.setdefault(self._class(self._level), _GapHistogram()).add(idle_s)
        self._all.add(idle_s)
        log_gap = math.log(min(max(idle_s, 1.0), _EDGES_S[-1]))
        self._level = log_gap if self._level is None else self._level + _LEVEL_STEP * (log_gap - self._level)
        # A very short gap is worth less than the time for a new plan.
        self._unplanned += 1
        if idle_s >= 1.0 or self._unplanned >= _PLAN_AFTER:
            self._windows = None

    def brought_back(self, seconds: float) -> None:
        usual_s = seconds if self._restore_s is None else self._restore_s
        self._restore_s = usual_s + _RESTORE_STEP * (seconds - usual_s)
        self._windows = None

    @staticmethod
    def _class(level: float) -> int:
        return int(level / _CLASS)

    def _computed(self) -> tuple[tuple[float, float], ...]:
        if self._level is None or self._restore_s is None:
            return ((0.0, 0.0),)
        everything = self._all.counts()
        share = _BORROWED / sum(everything)
        counts = [_PRIOR + share * count for count in everything]
        if (own := self._by_class.get(self._class(self._level))) is not None:
            counts = [count + more for count, more in zip(counts, own.counts(), strict=True)]
        # A released model is not restored: gaps beyond the idle timeout are equal.
        end = bisect_right(_EDGES_S, self.idle_timeout_s) - 1
        return _plan(counts[:end], sum(counts[end:]), self._restore_s, self.wait_weight)


class _GapHistogram:
    """Gap counts by bin, with decay: increases the weight of new gaps, which changes one bin instead of all."""

    def __init__(self) -> None:
        self._counts = [0.0] * (_LONGER + 1)
        self._weight = 1.0

    def add(self, idle_s: float) -> None:
        self._weight /= _DECAY
        self._counts[bisect_right(_EDGES_S, idle_s) - 1] += self._weight
        if self._weight > 1e100:
            self._counts, self._weight = self.counts(), 1.0

    def counts(self) -> list[float]:
        return [count / self._weight for count in self._counts]


def _plan(
    counts: Sequence[float], longer: float, restore_s: float, wait_weight: float
) -> tuple[tuple[float, float], ...]:
    """Returns the windows of maximum gain for gaps distributed as ``counts`` (``longer``: those beyond the last bin).

    Dynamic programming from the last bin back, with two states, here and away. Staying in a bin costs its seconds times
    the gaps that reach it, and gains a wait, a restore and an offload for each gap that ends in it. A departure or a
    return costs a restore time for each gap that reaches the bin.
    """
    gain_s = (wait_weight + 2.0) * restore_s
    evidence_s = _EVIDENCE * gain_s
    here_s = away_s = 0.0  # maximum gain of the rest of the gap, in device seconds
    reached = longer
    steps: list[tuple[bool, bool]] = []  # whether to be here in the bin, if here before it, and if away before it
    for index in range(len(counts) - 1, -1, -1):
        count = counts[index]
        be_here_s = here_s + count * gain_s - _WIDTHS_S[index] * (reached + 0.5 * count)
        reached += count
        move_s = restore_s * reached
        leave_s, return_s = away_s - move_s, be_here_s - move_s - evidence_s
        steps.append((be_here_s > leave_s, return_s > away_s))
        here_s, away_s = max(be_here_s, leave_s), max(away_s, return_s)

    windows: list[tuple[float, float]] = []
    here, from_s = True, 0.0
    for edge_s, (stay, come) in zip(_EDGES_S, reversed(steps), strict=False):
        if here and not stay:
            windows.append((from_s, edge_s))
        elif not here and come:
            from_s = edge_s - _LEAD * restore_s  # after the departure: an absence below two restore times never pays
        here = stay if here else come
    if here:
        windows.append((from_s, _EDGES_S[len(counts)]))
    return tuple(windows)
