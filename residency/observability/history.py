"""The history of one model: counts for dashboards, and the last quarter of an hour for the page. Pure.

Recorded at each event and read on demand, without a sampling thread. Other processes' use of the device causes no
events, so it is also recorded at each status call. Times are seconds of the manager's clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from ..errors import ManagerClosed, ModelBusy, RequestCancelled, RequestStopped, RequestTimeout, UnknownModel

if TYPE_CHECKING:
    from ..contracts import Memory
    from ..states import Move, State
    from ..status_types import DeviceUsage, HistogramCounts, LastMove, ModelUsage, MoveOutcome

WINDOW_S = 900.0
"""The period of `History.as_dict`."""

RECENT_MOVES = 20

BOUNDS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

_RESOLUTION_S = 1.0
"""Of a model's history; bounds its size for busy models."""

_DEVICE_RESOLUTION_S = 5.0
"""Of the device's use, which each status call records."""

_OUTCOMES = {
    RequestTimeout: "timeout",
    ModelBusy: "busy",
    RequestCancelled: "cancelled",
    ManagerClosed: "refused",
    UnknownModel: "refused",
}


class Histogram:
    """Counts durations in seconds by `BOUNDS_S`, for Prometheus."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def as_dict(self) -> HistogramCounts:
        bounds = [*map(str, BOUNDS_S), "+Inf"]
        return {
            "buckets": [[bound, count] for bound, count in zip(bounds, accumulate(self._counts), strict=True)],
            "sum": self.sum_s,
        }


@dataclass
class Sizes:
    """A size over the last `WINDOW_S`: each value holds until the next. Peaks and the last value are kept."""

    resolution_s: float = _RESOLUTION_S
    _points: deque[tuple[float, int]] = field(default_factory=deque)

    def note(self, now_s: float, nbytes: int) -> None:
        points = self._points
        if points and points[-1][1] == nbytes:
            return
        if len(points) > 1 and now_s - points[-2][0] < self.resolution_s:
            last = points.pop()
            points[-1] = (points[-1][0], max(points[-1][1], last[1]))
        points.append((now_s, nbytes))
        while len(points) > 1 and points[1][0] < now_s - WINDOW_S:  # keeps the value at the window's begin
            points.popleft()

    def as_list(self, now_s: float) -> list[list[float]]:
        """Returns [seconds before ``now_s``, bytes from then on], the oldest first."""
        return [[_ago(max(time_s, now_s - WINDOW_S), now_s), nbytes] for time_s, nbytes in self._points]


@dataclass
class GivenBack:
    """The integral over time of the bytes that a model does not use on the device; they change at moves only."""

    _byte_s: float = 0.0
    _nbytes: int = 0
    _since_s: float = 0.0

    def note(self, now_s: float, nbytes: int) -> None:
        """Records that it is ``nbytes`` from now on."""
        self._byte_s = self._until(now_s)
        self._nbytes, self._since_s = max(0, nbytes), now_s

    def byte_hours(self, now_s: float) -> float:
        return self._until(now_s) / 3600

    def _until(self, now_s: float) -> float:
        return self._byte_s + self._nbytes * (now_s - self._since_s)


class DeviceHistory:
    """The used memory of the device, by all processes. Used under the manager's lock."""

    def __init__(self) -> None:
        self._used = Sizes(_DEVICE_RESOLUTION_S)
        self._total_bytes: int | None = None

    def note(self, now_s: float, memory: Memory) -> None:
        if memory.total_bytes is not None and memory.free_bytes is not None:
            self._total_bytes = memory.total_bytes
            self._used.note(now_s, memory.total_bytes - memory.free_bytes)

    def as_dict(self, now_s: float) -> DeviceUsage:
        return {"used_bytes": self._used.as_list(now_s), "total_bytes": self._total_bytes}


@dataclass(frozen=True)
class PastMove:
    """A move that has ended at ``time_s``: ``ok``, ``failed``, or ``postponed`` until there is room."""

    time_s: float
    move: Move
    moved_bytes: int
    seconds: float
    outcome: MoveOutcome

    def as_dict(self, device_kind: str) -> LastMove:
        return {
            "from": self.move.source.place(device_kind),
            "to": self.move.target.place(device_kind),
            "bytes": self.moved_bytes,
            "seconds": round(self.seconds, 6),
        }


@dataclass
class History:
    """Requests, moves and sizes of one model. Used under the manager's lock. Of bounded size."""

    requests: Counter[str] = field(default_factory=Counter)
    """By outcome: ``ok``, ``error`` (of the engine), ``timeout``, ``busy``, ``cancelled``, ``refused``, ``failed``."""
    waits: Histogram = field(default_factory=Histogram)
    moves: Counter[tuple[State, State, MoveOutcome]] = field(default_factory=Counter)
    move_seconds: Histogram = field(default_factory=Histogram)
    recent: deque[PastMove] = field(default_factory=lambda: deque(maxlen=RECENT_MOVES))
    given_back: GivenBack = field(default_factory=GivenBack)
    _sizes: Sizes = field(default_factory=Sizes)
    _spans: deque[tuple[float, float]] = field(default_factory=deque)

    def served(self, asked_s: float, began_s: float, ended_s: float, error: BaseException | None) -> None:
        """Records a request that held the model from ``began_s`` to ``ended_s``; ``error``: why it failed, if so."""
        outcome = "ok" if error is None else "cancelled" if isinstance(error, RequestStopped) else "error"
        self.requests[outcome] += 1
        self.waits.add(max(0.0, began_s - asked_s))
        spans = self._spans
        if spans and began_s - spans[-1][1] < _RESOLUTION_S:
            spans[-1] = (spans[-1][0], ended_s)
            return
        spans.append((began_s, ended_s))
        while spans[0][1] < ended_s - WINDOW_S:
            spans.popleft()

    def refused(self, error: BaseException) -> None:
        """Records a request that ended without the model."""
        self.requests[next((word for kind, word in _OUTCOMES.items() if isinstance(error, kind)), "failed")] += 1

    def moved(self, past: PastMove, device_bytes: int) -> None:
        """Records a move that has ended; ``device_bytes``: the model's size on the device (or CPU) now."""
        self.moves[past.move.source, past.move.target, past.outcome] += 1
        self.move_seconds.add(past.seconds)
        self.recent.append(past)
        self._sizes.note(past.time_s, device_bytes)

    def as_dict(self, now_s: float, device_kind: str, running_since_s: float | None = None) -> ModelUsage:
        """Returns the model's entry in ``GET /gpu/history``; ``running_since_s``: start of the running request."""
        begin_s = now_s - WINDOW_S
        spans = [*self._spans, *([] if running_since_s is None else [(running_since_s, now_s)])]
        shown = [(max(began_s, begin_s), ended_s) for began_s, ended_s in spans if ended_s > begin_s]
        return {
            "device_bytes": self._sizes.as_list(now_s),
            "requests": [[_ago(began_s, now_s), _ago(ended_s, now_s)] for began_s, ended_s in shown],
            "moves": [
                {"ago_s": _ago(past.time_s, now_s), **past.as_dict(device_kind), "outcome": past.outcome}
                for past in self.recent
            ],
            "totals": {
                "requests": dict(self.requests),
                "request_wait_seconds": self.waits.as_dict(),
                "moves": [
                    {"from": source.place(device_kind), "to": target.place(device_kind), "outcome": outcome, "count": n}
                    for (source, target, outcome), n in self.moves.items()
                ],
                "move_seconds": self.move_seconds.as_dict(),
                "given_back_byte_hours": None if device_kind == "cpu" else self.given_back.byte_hours(now_s),
            },
        }


def _ago(time_s: float, now_s: float) -> float:
    return round(max(0.0, now_s - time_s), 3)
