"""Costs of a lease of an offloaded model: discovery of weights, offload and restore."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpu_manager import GPUResourceManager, SimulatedDevice

MODEL = "tts"
CYCLES = 3


@dataclass(frozen=True)
class Cold:
    """CPU seconds of all threads for one cycle: lease, offload, lease.

    Attributes:
        first: cycle with the load, by a loader that returns an existing engine.
        later: median of the following cycles.
        wanted: upper limit of ``later``; None without a goal.
    """

    name: str
    first: float
    later: float
    wanted: float | None


class Small:
    def __init__(self, number: int) -> None:
        self.number = number
        self.name = str(number)


def parameters(count: int) -> Any:
    return torch.nn.ParameterList(torch.zeros(4) for _ in range(count))


def modules(count: int) -> Any:
    return torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(count // 2))


def objects(count: int) -> Any:
    return {"objects": [Small(number) for number in range(count)], "module": torch.nn.Linear(4, 4)}


ROWS: Sequence[tuple[str, Callable[[int], Any], int, float | None]] = (
    ("parameters in a list", parameters, 20_000, 0.15),
    ("parameters in a list", parameters, 100_000, 0.8),
    ("parameters in modules of two", modules, 20_000, None),
    ("parameters in modules of two", modules, 100_000, None),
    ("small Python objects", objects, 1_000_000, 1.5),
)


def measure_cold(share: float) -> list[Cold]:
    """Measures every row, with ``share`` of its parameters or objects."""
    rows = []
    for what, build, count, wanted in ROWS:
        engine = build(int(count * share))
        with GPUResourceManager(SimulatedDevice(1 << 34)) as manager:
            manager.register(MODEL, lambda engine=engine: engine, keep_warm=-1)
            first, *later = [time_cycle(manager) for _ in range(1 + CYCLES)]
        rows.append(Cold(f"{int(count * share):,} {what}", first, statistics.median(later), wanted))
        del engine
    return rows


def time_cycle(manager: GPUResourceManager) -> float:
    start = time.process_time()
    with manager.lease(MODEL):
        pass
    manager.offload(MODEL)
    with manager.lease(MODEL):
        pass
    return time.process_time() - start


def print_cold(rows: Sequence[Cold]) -> None:
    print(f"\nlease, offload, lease: CPU seconds of all threads\n{'':46}{'with the load':>16}{'later':>10}")
    for row in rows:
        print(f"{row.name:46}{row.first:16.3f}{row.later:10.3f}")
