"""Arrival times of four usage patterns: seconds from the start, in order, reproducible by seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import takewhile

DAY_S = 86_400.0


def steady(rng: random.Random) -> Iterator[float]:
    """Yields a job every ten minutes, with a standard deviation of 15 s."""
    now_s = 0.0
    while True:
        now_s += max(60.0, rng.gauss(600.0, 15.0))
        yield now_s


def bursty(rng: random.Random) -> Iterator[float]:
    """Yields bursts of six requests on average, 16 s apart (log-normal), with pauses of an hour."""
    now_s = 0.0
    while True:
        now_s += 300.0 + rng.expovariate(1 / 3300.0)
        yield now_s
        while rng.random() < 5 / 6:
            now_s += 4.0 + rng.lognormvariate(math.log(12.0), 0.7)
            yield now_s


def daily(rng: random.Random) -> Iterator[float]:
    """Yields random arrivals, with rates from once a minute in the afternoon to every two hours at night."""
    busiest, ratio = 1 / 60.0, 120.0
    now_s = 0.0
    while True:
        now_s += rng.expovariate(busiest)
        from_peak = (1 - math.cos(2 * math.pi * (now_s / DAY_S - 0.6))) / 2
        if rng.random() < ratio**-from_peak:
            yield now_s


def independent(rng: random.Random) -> Iterator[float]:
    """Yields random arrivals, every five minutes on average; only the rate can be learned."""
    now_s = 0.0
    while True:
        now_s += rng.expovariate(1 / 300.0)
        yield now_s


TRACES = {"steady": steady, "bursty": bursty, "daily": daily, "random": independent}


def trace(name: str, seed: int, days: float) -> list[float]:
    arrivals = TRACES[name](random.Random(f"{name} {seed}"))
    return list(takewhile(lambda now_s: now_s < days * DAY_S, arrivals))
