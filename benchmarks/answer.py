"""Measures the time from the engine's answer to the caller's `return`, while the model is offloaded.

    python benchmarks/answer.py

Uses an engine of 1 GB on a simulated card with keep-warm 0, so that its weights leave after each request. In each
round a new manager serves a first request, whose offload copies all weights, and more, whose offloads drop them.
Exits with 1 if a median misses its goal.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from gpu_manager import GPUResourceManager, SimulatedDevice, State
from tts_gpu_managed import GPUManagedTTS

MODEL = "tts"
MOST_MS = 2.0


class Engine:
    """Engine with weights, an answer of one second of audio, and its time."""

    def __init__(self, nbytes: int) -> None:
        self.weights = [torch.randn(1 << 22) for _ in range(nbytes >> 24)]
        self.answered_s = 0.0

    def clone(self, prompt_wav_path: str, prompt_text: str, target_text: str) -> tuple[torch.Tensor, int]:
        audio = torch.zeros(1, 24_000)
        self.answered_s = time.perf_counter()
        return audio, 24_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--mb", type=int, default=1024, help="size of the engine in MB (1024)")
    add("--rounds", type=int, default=7, help="how many managers (7)")
    add("--requests", type=int, default=5, help="how many requests after the first in each round (5)")
    options = parser.parse_args()
    print(
        f"{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"load average {os.getloadavg()[0]:.1f}, {options.mb} MB on a simulated card",
        flush=True,
    )
    times_ms: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, value in one_round(options.mb << 20, options.requests):
            times_ms.setdefault(name, []).append(value)
    missed = False
    print(f"\n{'':34}{'median ms':>12}{'most ms':>12}{'wanted':>12}")
    for name, values in times_ms.items():
        median = statistics.median(values)
        judged = "" if name == "offload" else f"{f'<= {MOST_MS:g} ms':>12}  {'yes' if median <= MOST_MS else 'no'}"
        missed = missed or (name != "offload" and median > MOST_MS)
        print(f"{name:34}{median:12.2f}{max(values):12.2f}{judged}")
    if missed:
        sys.exit(1)


def one_round(nbytes: int, requests: int) -> list[tuple[str, float]]:
    """Returns (row, milliseconds) of one manager's requests."""
    found = []
    with GPUResourceManager(SimulatedDevice(4 * nbytes)) as manager:
        tts = GPUManagedTTS(None, manager=manager, load=lambda: Engine(nbytes), name=MODEL)
        for number in range(requests + 1):
            tts.clone("", "", "")
            returned_s = time.perf_counter()
            manager.offload(MODEL)
            offloaded_s = time.perf_counter()
            with tts.lease() as engine:
                found.append(("clone, first request" if not number else "clone", _ms(returned_s - engine.answered_s)))
            manager.wait_for(MODEL, State.HOST)
            found.append(("lease", time_lease(manager)))
            manager.wait_for(MODEL, State.HOST)
            if number:
                found.append(("offload", _ms(offloaded_s - returned_s)))
    return found


def time_lease(manager: GPUResourceManager) -> float:
    """Measures the same for a function that returns from within its lease."""

    def request() -> float:
        with manager.lease(MODEL):
            return time.perf_counter()

    answered_s = request()
    return _ms(time.perf_counter() - answered_s)


def _ms(seconds: float) -> float:
    return seconds * 1000


if __name__ == "__main__":
    main()
