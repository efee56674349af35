"""When requests arrive, by four kinds of use: seconds from the start, in order. The same seed gives the same trace."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import takewhile

DAY_S = 86_400.0


def steady(rng: random.Random) -> Iterator[float]:
    """A job every ten minutes, late or early by a quarter of a minute (standard deviation)."""
    now_s = 0.0
    while True:
        now_s += max(60.0, rng.gauss(600.0, 15.0))
        yield now_s


def bursty(rng: random.Random) -> Iterator[float]:
    """Somebody makes six requests on average, thinks for 16 s between them (log-normal) and is away for an hour."""
    now_s = 0.0
    while True:
        now_s += 300.0 + rng.expovariate(1 / 3300.0)
        yield now_s
        while rng.random() < 5 / 6:
            now_s += 4.0 + rng.lognormvariate(math.log(12.0), 0.7)
            yield now_s


def daily(rng: random.Random) -> Iterator[float]:
    """Random arrivals, once a minute in the afternoon and every two hours at night, and all rates between."""
    busiest, ratio = 1 / 60.0, 120.0
    now_s = 0.0
    while True:
        now_s += rng.expovariate(busiest)
        from_peak = (1 - math.cos(2 * math.pi * (now_s / DAY_S - 0.6))) / 2
        if rng.random() < ratio**-from_peak:
            yield now_s


def independent(rng: random.Random) -> Iterator[float]:
    """Random arrivals, every five minutes on average: nothing can be learned but the rate."""
    now_s = 0.0
    while True:
        now_s += rng.expovariate(1 / 300.0)
        yield now_s


TRACES = {"steady": steady, "bursty": bursty, "daily": daily, "random": independent}


def trace(name: str, seed: int, days: float) -> list[float]:
    arrivals = TRACES[name](random.Random(f"{name} {seed}"))
    return list(takewhile(lambda now_s: now_s < days * DAY_S, arrivals))
