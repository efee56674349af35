"""A day of many users on many GPUs, simulated from measured parts: always-on, scale-to-zero, and this project.

Pure functions: no clock, no device, no Ray. All times are seconds from the beginning of the day.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

DAY_S, HOUR_S, SOON_S = 86400.0, 3600.0, 2.0


@dataclass(frozen=True)
class Request:
    """A request for one model, and the seconds for which it computes."""

    arrival_s: float
    model: int
    compute_s: float


@dataclass(frozen=True)
class Load:
    """The users of a day. Sessions begin as a Poisson process; the k-th model is used 1/k as often as the first."""

    users: int
    models: int
    seed: int
    sessions: float = 1.5
    """Of a user in a day."""
    requests: float = 4.0
    """Of a session, on average (geometric)."""
    sentences: int = 5
    """Most of a request; uniform from 1."""
    sentence_s: float = 2.0
    think_s: float = 20.0
    """Between two requests of a session, beside the time for which the first computes; on average (exponential)."""
    swing: float = 0.9
    """The arrivals at 16 h are 1 + this times the average, and at 4 h 1 - this."""


def arrivals(load: Load) -> list[Request]:
    """Returns the requests of the day in order of arrival; the same for the same ``load``."""
    return sorted(_requests(load), key=lambda request: request.arrival_s)


def _requests(load: Load) -> Iterator[Request]:
    dice = random.Random(f"day {load.seed}")
    models = range(load.models)
    weights = list(itertools.accumulate(1 / (model + 1) for model in models))
    most_per_s = load.users * load.sessions / DAY_S * (1 + load.swing)
    now_s = 0.0
    while (now_s := now_s + dice.expovariate(most_per_s)) < DAY_S:
        if dice.random() * (1 + load.swing) > 1 - load.swing * math.cos(2 * math.pi * (now_s / HOUR_S - 4) / 24):
            continue
        (model,) = dice.choices(models, cum_weights=weights)
        at_s, more = now_s, True
        while more and at_s < DAY_S:
            compute_s = dice.randint(1, load.sentences) * load.sentence_s
            yield Request(at_s, model, compute_s)
            at_s += compute_s + dice.expovariate(1 / load.think_s)
            more = dice.random() >= 1 / load.requests


@dataclass(frozen=True)
class Strategy:
    """How replicas use the GPUs. Of those that share a GPU, one has its weights there and computes at a time."""

    name: str
    places: int = 1
    """Replicas on a GPU."""
    packs: bool = False
    """A replica starts on the fullest GPU with a place, else on the emptiest."""
    always: bool = False
    """Replicas are there all day, with the best division of the GPUs, see `_always_on`; no others start."""
    process_s: float = 0.0
    load_s: float = 0.0
    """With the GPU, after ``process_s``."""
    restore_s: float = 0.0
    offload_s: float = 0.0
    warm_s: float = math.inf
    """The weights leave the GPU after this time without a request."""
    ends_s: float = math.inf
    """The replica ends after this time without a request."""


@dataclass
class Outcome:
    """``begun_s`` and ``gpu``: of each request; None: no replica serves its model. Seconds: of all GPUs in the day."""

    begun_s: list[float | None]
    gpu: list[int | None]
    reserved_s: float = 0.0
    """A replica has a place on the GPU."""
    held_s: float = 0.0
    """Weights are on the GPU, or move."""
    computing_s: float = 0.0
    starts: int = 0
    restores: int = 0


@dataclass(eq=False)
class _Replica:
    model: int
    gpu: _Gpu
    due_s: float
    loaded: bool = False
    uses: int = 0


@dataclass(eq=False)
class _Gpu:
    number: int
    replicas: list[_Replica] = field(default_factory=list)
    busy: bool = False
    on: _Replica | None = None
    idle_since_s: float = 0.0
    reserved_since_s: float = 0.0


class _Day:
    """The state of the simulation; `run` returns its result."""

    def __init__(self, requests: Sequence[Request], gpus: int, strategy: Strategy) -> None:
        self._requests, self._strategy = requests, strategy
        self._gpus = [_Gpu(number) for number in range(gpus)]
        self._replicas: dict[int, list[_Replica]] = {}
        self._waiting: dict[int, deque[int]] = {}
        self._running: dict[int, int] = {}
        self._no_place: dict[int, int] = {}
        self._events: list[tuple[float, int, str, _Replica, int]] = []
        self._count = itertools.count()
        self._now_s = 0.0
        self._outcome = Outcome([None] * len(requests), [None] * len(requests))

    def run(self) -> Outcome:
        for number, request in enumerate(self._requests):
            self._advance(request.arrival_s)
            self._arrive(number, request.model)
        self._advance(math.inf)
        for gpu in self._gpus:
            self._count_held(gpu, math.inf)
            if gpu.replicas:
                self._outcome.reserved_s += _in_the_day(gpu.reserved_since_s, DAY_S)
        return self._outcome

    def _at(self, time_s: float, what: str, replica: _Replica) -> None:
        if time_s < math.inf:
            heapq.heappush(self._events, (time_s, next(self._count), what, replica, replica.uses))

    def _advance(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self._now_s, _, what, replica, uses = heapq.heappop(self._events)
            if what == "started":
                self._next(replica.gpu)
            elif what == "done":
                self._done(replica)
            elif uses == replica.uses:
                self._end(replica)
        self._now_s = until_s

    def _arrive(self, number: int, model: int) -> None:
        self._waiting.setdefault(model, deque()).append(number)
        replicas = self._replicas.setdefault(model, [])
        free = [one for one in replicas if one.loaded and not one.gpu.busy]
        if free:
            self._next(min(free, key=lambda one: (one.gpu.on is not one, one.gpu.on is not None)).gpu)
        under_way = len(self._waiting[model]) + self._running.get(model, 0)
        if under_way > len(replicas) + self._no_place.get(model, 0):
            self._no_place[model] = self._no_place.get(model, 0) + 1
            self._start_waiting()

    def _start_waiting(self) -> None:
        """Starts replicas for which there are places, one of each model, in order of their requests."""
        for model in list(self._no_place):
            if all(len(gpu.replicas) >= self._strategy.places for gpu in self._gpus):
                return
            gpu = self._place(model)
            if gpu is None and self._waiting[model]:
                continue
            wanted = min(self._no_place.pop(model), len(self._waiting[model]))  # others may have answered meanwhile
            if gpu is not None and wanted:
                self._start(gpu, model)
                if wanted > 1:
                    self._no_place[model] = wanted - 1  # behind the others

    def _place(self, model: int) -> _Gpu | None:
        """Returns the GPU for another replica of the model."""
        free = [
            gpu for gpu in self._gpus
            if len(gpu.replicas) < self._strategy.places and all(one.model != model for one in gpu.replicas)
        ]  # fmt: skip
        fill = -1 if self._strategy.packs else 1
        return min(free, key=lambda gpu: (fill * len(gpu.replicas), gpu.number), default=None)

    def _start(self, gpu: _Gpu, model: int) -> None:
        if not gpu.replicas:
            gpu.reserved_since_s = self._now_s
        replica = _Replica(model, gpu, self._now_s + self._strategy.process_s)
        gpu.replicas.append(replica)
        self._replicas[model].append(replica)
        self._outcome.starts += 1
        self._at(replica.due_s, "started", replica)

    def _next(self, gpu: _Gpu) -> None:
        """Gives a free GPU to the load or request that has waited longest for it."""
        if gpu.busy:
            return
        turns = []
        for replica in gpu.replicas:
            if replica.loaded and (waiting := self._waiting.get(replica.model)):
                turns.append((self._requests[waiting[0]].arrival_s, replica))
            elif not replica.loaded and replica.due_s <= self._now_s:
                turns.append((replica.due_s, replica))
        if turns:
            _, replica = min(turns, key=lambda turn: turn[0])
            self._begin(gpu, replica)

    def _begin(self, gpu: _Gpu, replica: _Replica) -> None:
        strategy, begin_s = self._strategy, self._now_s
        self._count_held(gpu, begin_s)
        gpu.busy, replica.uses = True, replica.uses + 1
        if gpu.on is not None and gpu.on is not replica:
            leaves_s = min(begin_s, gpu.idle_since_s + strategy.warm_s)
            begin_s = max(begin_s, leaves_s + strategy.offload_s)
        elif gpu.on is replica and begin_s > gpu.idle_since_s + strategy.warm_s:
            begin_s = max(begin_s, gpu.idle_since_s + strategy.warm_s + strategy.offload_s)
            gpu.on = None
        if not replica.loaded:
            begin_s += strategy.load_s
            end_s = begin_s
        else:
            if gpu.on is not replica:
                begin_s += strategy.restore_s
                self._outcome.restores += strategy.restore_s > 0
            number = self._waiting[replica.model].popleft()
            self._outcome.begun_s[number], self._outcome.gpu[number] = begin_s, gpu.number
            self._running[replica.model] = self._running.get(replica.model, 0) + 1
            end_s = begin_s + self._requests[number].compute_s
            self._outcome.computing_s += _in_the_day(begin_s, end_s)
        self._outcome.held_s += _in_the_day(self._now_s, end_s)
        gpu.on = replica
        self._at(end_s, "done", replica)

    def _count_held(self, gpu: _Gpu, until_s: float) -> None:
        """Counts the weights that have stayed since the last request."""
        if gpu.on is not None:
            gone_s = gpu.idle_since_s + self._strategy.warm_s + self._strategy.offload_s
            self._outcome.held_s += _in_the_day(gpu.idle_since_s, min(until_s, gone_s))

    def _done(self, replica: _Replica) -> None:
        gpu = replica.gpu
        gpu.busy, gpu.idle_since_s = False, self._now_s
        if replica.loaded:
            self._running[replica.model] -= 1
        replica.loaded = True
        self._at(self._now_s + self._strategy.ends_s, "idle", replica)
        self._next(gpu)

    def _end(self, replica: _Replica) -> None:
        """Of a replica that no request has used since."""
        gpu = replica.gpu
        if gpu.on is replica:
            self._count_held(gpu, self._now_s)
            gpu.on = None
        gpu.replicas.remove(replica)
        self._replicas[replica.model].remove(replica)
        if not gpu.replicas:
            self._outcome.reserved_s += _in_the_day(gpu.reserved_since_s, self._now_s)
        self._start_waiting()


def _in_the_day(from_s: float, until_s: float) -> float:
    return max(0.0, min(until_s, DAY_S) - min(from_s, DAY_S))


def _queue(requests: Sequence[Request], gpus: int) -> list[tuple[float, int]]:
    """Returns the begin of each request, and the GPU that computes it, in order of arrival; nothing without GPUs."""
    free = [(0.0, gpu) for gpu in range(gpus)]
    begun: list[tuple[float, int]] = []
    for request in requests if gpus else ():
        free_s, gpu = free[0]
        begun.append((max(free_s, request.arrival_s), gpu))
        heapq.heapreplace(free, (begun[-1][0] + request.compute_s, gpu))
    return begun


def _values(requests: Sequence[Request], gpus: int) -> list[tuple[int, int, float]]:
    """Returns the value to one model of 0, 1, ... GPUs, up to the fewest with which no request waits.

    The greater, the better: requests begun within `SOON_S`, then requests served, then the seconds of waiting, negated.
    """
    values = [(0, 0, 0.0)]
    while len(values) <= gpus and (len(values) == 1 or values[-1][2]):
        queue = _queue(requests, len(values))
        waits = [begun_s - request.arrival_s for request, (begun_s, _) in zip(requests, queue, strict=True)]
        values.append((sum(wait_s <= SOON_S for wait_s in waits), len(waits), -sum(waits)))
    return values


def _division(models: Sequence[Sequence[Request]], gpus: int) -> tuple[int, ...]:
    """Returns the number of GPUs of each model, with the greatest sum of `_values`."""
    best: list[tuple[tuple[int, int, float], tuple[int, ...]]] = [((0, 0, 0.0), ())] * (gpus + 1)  # with 0, 1, ... GPUs
    for requests in models:
        values, before, best = _values(requests, gpus), best, []
        for most in range(gpus + 1):
            sums = []
            for count, (soon, served, waits) in enumerate(values[: most + 1]):
                (others_soon, others_served, others_waits), others = before[most - count]
                sums.append(((others_soon + soon, others_served + served, others_waits + waits), (*others, count)))
            best.append(max(sums, key=lambda one: one[0]))
    return best[-1][1]


def _always_on(requests: Sequence[Request], gpus: int) -> Outcome:
    """Returns the outcome of the best division of the GPUs for these requests, known in advance."""
    numbers: dict[int, list[int]] = {}
    for number, request in enumerate(requests):
        numbers.setdefault(request.model, []).append(number)
    models = [[requests[number] for number in its] for its in numbers.values()]
    outcome = Outcome([None] * len(requests), [None] * len(requests))
    used = 0
    for its, model, count in zip(numbers.values(), models, _division(models, gpus), strict=True):
        for number, (begun_s, gpu) in zip(its, _queue(model, count), strict=False):  # none without GPUs
            outcome.begun_s[number], outcome.gpu[number] = begun_s, used + gpu
            outcome.computing_s += _in_the_day(begun_s, begun_s + requests[number].compute_s)
        used += count
    outcome.reserved_s = outcome.held_s = used * DAY_S
    return outcome


def simulate(requests: Sequence[Request], gpus: int, strategy: Strategy) -> Outcome:
    """Returns what ``gpus`` do with the requests of a day, which are in order of arrival."""
    return _always_on(requests, gpus) if strategy.always else _Day(requests, gpus, strategy).run()


def waits_s(requests: Sequence[Request], outcome: Outcome) -> list[float]:
    """Returns the seconds from arrival to the begin of each served request."""
    pairs = zip(requests, outcome.begun_s, strict=True)
    return [begun_s - request.arrival_s for request, begun_s in pairs if begun_s is not None]
