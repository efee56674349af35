"""Outcomes of all requests, and their invariants."""

from __future__ import annotations

import itertools
import math
import statistics
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_manager import (
    DeviceOutOfMemory,
    Event,
    LeaseDeadlock,
    LoadTimeout,
    ManagerClosed,
    ModelBusy,
    RequestCancelled,
    RequestTimeout,
)

from ._soak_models import EngineBroke, LoaderBroke, ResidentBroke

EARLY_S = 0.002
"""A move earlier than its deadline by more than this was made for room, not by the deadline."""


@dataclass(frozen=True)
class Plan:
    """Planned behavior of a request."""

    number: int
    model: str
    timeout_s: float | None = None
    cancel_after_s: float | None = None
    breaks: bool = False
    discards: bool = False
    nested: str | None = None
    holds_s: float = 0.0


class Books:
    """Thread-safe record of all requests, checked by `problems`. Preallocated, so that memory stays constant."""

    #: Excludes it from the search of an engine's parts.
    not_of_the_engine = True

    def __init__(self, requests: int) -> None:
        self._lock = threading.Lock()
        self.requests = requests
        self.executed = array("b", bytes(requests))
        self.ended = array("b", bytes(requests))
        self.waits_s = array("d", [math.nan]) * requests
        self.promised_cancels = array("b", bytes(requests))
        self.late_timeouts_s = array("d")
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.closing = False
        self.progress = 0

    def ran(self, number: int) -> None:
        with self._lock:
            self.executed[number] += 1

    def fault(self, sentence: str) -> None:
        with self._lock:
            if len(self.wrong) < 1000:
                self.wrong.append(sentence)

    def end(self, plan: Plan, error: BaseException | None, wait_s: float) -> None:
        """Records the end of a request, by an answer or by an error that must belong to this request."""
        outcome = outcome_of(plan, error, self.closing)
        with self._lock:
            self.ended[plan.number] += 1
            self.waits_s[plan.number] = wait_s
            self.outcomes[outcome or f"UNEXPECTED {type(error).__name__}"] += 1
            self.progress += 1
            if isinstance(error, RequestTimeout) and plan.timeout_s is not None:
                self.late_timeouts_s.append(max(0.0, wait_s - plan.timeout_s))
        if outcome is None:
            self.fault(f"request {plan.number} on {plan.model!r} ended with an error that is not its own: {error!r}")
        ran = self.executed[plan.number]
        expected = outcome in RUNS
        if ran != expected:
            self.fault(f"request {plan.number} ({outcome}) was in an engine {ran} times, not {int(expected)}")

    def problems(self) -> list[str]:
        found = list(self.wrong)
        lost = [number for number, times in enumerate(self.ended) if not times]
        doubled = [number for number, times in enumerate(self.ended) if times > 1]
        both = [number for number, promised in enumerate(self.promised_cancels) if promised and self.executed[number]]
        if both:
            found.append(f"{len(both)} requests got the model after cancel() had said True, the first is {both[0]}")
        if lost:
            found.append(f"{len(lost)} requests were lost, the first is {lost[0]}")
        if doubled:
            found.append(f"{len(doubled)} requests ended more than once, the first is {doubled[0]}")
        return found


ANSWERED, BROKE, IN_DEADLOCK = "answered right", "its engine broke", "would have waited for itself"
RUNS = (ANSWERED, BROKE)


def outcome_of(plan: Plan, error: BaseException | None, closing: bool) -> str | None:
    """Returns the outcome; None for an error that does not belong to this request."""
    others = {plan.model, plan.nested}
    if error is None:
        return None if plan.breaks else ANSWERED
    if isinstance(error, EngineBroke):
        return BROKE if plan.breaks and error.args == (plan.number,) else None
    if isinstance(error, RequestTimeout):
        return "timed out" if plan.timeout_s is not None and error.name == plan.model else None
    if isinstance(error, ModelBusy):
        return "not taken: busy" if error.name in others else None
    if isinstance(error, RequestCancelled):
        return "cancelled" if plan.cancel_after_s is not None and error.name == plan.model else None
    if isinstance(error, LoadTimeout):
        return "its loader hung" if error.name in others else None
    if isinstance(error, LoaderBroke):
        return "its loader broke" if error.args[0] in others else None
    if isinstance(error, ResidentBroke):
        return "its move broke" if str(error).split(":")[0] in others else None
    if isinstance(error, DeviceOutOfMemory):
        return "device full"
    if isinstance(error, LeaseDeadlock):
        return IN_DEADLOCK if plan.nested and plan.nested != plan.model else None
    if isinstance(error, ManagerClosed):
        return "closed" if closing else None
    return None


class Deadlines:
    """Listener that measures the delay of moves of idle models after their deadlines, in seconds.

    Excludes a keep-warm of 0, and idle times interrupted by a request, a manual move or a failed move.
    """

    def __init__(self, status: Callable[[], dict[str, Any]], models: Sequence[str]) -> None:
        self._status = status
        self._touched_s = dict.fromkeys(models, -math.inf)
        self._under_way = dict.fromkeys(models, False)
        self.overshot_s: dict[str, array[float]] = {"cpu": array("d"), "released": array("d")}
        self.out_of_order = 0
        self.heard: Counter[str] = Counter()

    def touch(self, model: str) -> None:
        """Marks the idle time of a model as interrupted."""
        self._touched_s[model] = time.monotonic()

    def hear(self, event: Event) -> None:
        self.heard[event.what] += 1
        if event.what == "failed":
            self._touched_s[event.model] = event.time_s
        if event.what in ("began", "done", "failed"):
            begins = event.what == "began"
            self.out_of_order += self._under_way[event.model] == begins
            self._under_way[event.model] = begins
        if event.what != "began" or event.target == "gpu":
            return
        shown = self._status()["models"][event.model]
        if shown["idle_s"] is None or -1 in (shown["keep_warm_s"], shown["idle_timeout_s"]):
            return
        idle_since_s = time.monotonic() - shown["idle_s"]
        stays_s = shown["keep_warm_s"]
        if event.target == "released":
            stays_s = max(stays_s, shown["idle_timeout_s"])
        late_s = event.time_s - idle_since_s - stays_s
        if stays_s > 0 and late_s >= -EARLY_S and self._touched_s[event.model] < idle_since_s:
            self.overshot_s[event.target].append(max(0.0, late_s))


def share_of(values: Sequence[float], share: float) -> float:
    """Returns a percentile; nan without values."""
    ordered = sorted(value for value in values if not math.isnan(value))
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else math.nan


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Returns the median of the slopes between all pairs of points (robust to outliers); 0 for less than two points."""
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.combinations(points, 2)]
    return statistics.median(slopes) if slopes else 0.0
