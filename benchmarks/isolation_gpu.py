"""Measures worker processes on an NVIDIA GPU: what they leave there, and how fast a model returns.

    python benchmarks/isolation_gpu.py                       # a model of 8 GB
    python benchmarks/isolation_gpu.py --gb 2 --rounds 3     # a smaller one; its return is not compared with the goal

Lists the processes and the used memory that NVML reports before the first load and after each step. Then measures the
return of a checkpointed model, and the copy of its weights against the pinned link of the same run. Needs what
checkpoints need (docs/en/isolation.md#requirements). Exits with 1 if a goal is missed, with 2 if it cannot measure.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from gpu_manager import CudaDevice, GPUResourceManager
from residency.contracts import Device
from residency.devices.card_probes import NvmlProbe, driver_version
from residency.memory.mirror import HostMirror
from residency.workers.checkpoints import DriverCheckpoints
from residency.workers.isolation import Residue

MODEL = "tts"
MB, GB = 1 << 20, 1 << 30
CHUNK_BYTES = 64 * MB
BEFORE, LOADED, OFFLOADED, RELEASED = "before the first load", "loaded", "offloaded and checkpointed", "released"
RETURN_GB, RETURN_S = 8, 1.2
OF_LINK = 0.9
SAME_WITHIN_BYTES = 2 * MB
"""The driver counts memory in pages of this size."""


class Engine:
    """Engine with ``nbytes`` of random weights (at least 64 MB) on ``device``."""

    def __init__(self, nbytes: int, device: str) -> None:
        count = max(1, nbytes // CHUNK_BYTES)
        self.weights = [torch.randn(CHUNK_BYTES // 4, device=device) for _ in range(count)]

    def __call__(self) -> float:
        """Uses a matrix product, which has workspaces; returns a value that depends on each weight."""
        square = self.weights[0][: 1 << 20].view(1024, 1024)
        return float((square @ square).abs().sum()) + sum(float(each.double().sum()) for each in self.weights)

    def pinned_bytes(self) -> int:
        return sum(each.pinned_bytes for each in gc.get_objects() if isinstance(each, HostMirror))

    def link_bytes_per_s(self) -> float:
        """Returns the rate of copies of pinned memory to the device, the best of five."""
        device = self.weights[0].device
        host = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
        there = torch.empty_like(host, device=device)
        return 16 * CHUNK_BYTES / min(_copy_seconds(there, host) for _ in range(5))


def _copy_seconds(there: torch.Tensor, host: torch.Tensor) -> float:
    if there.is_cuda:
        torch.cuda.synchronize()
    began_s = time.perf_counter()
    for _ in range(16):
        there.copy_(host, non_blocking=True)
    if there.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began_s


@dataclass(frozen=True)
class Card:
    """What the driver reports of the card."""

    pids: frozenset[int]
    used_bytes: int


@dataclass
class Findings:
    nbytes: int
    #: The card before the first load and after each step.
    steps: dict[str, Card] = field(default_factory=dict)
    #: From a request for the checkpointed model until it has it.
    return_s: float = 0.0
    copy_bytes_per_s: float = 0.0
    link_bytes_per_s: float = 0.0
    answers: set[float] = field(default_factory=set)


@dataclass(frozen=True)
class Goal:
    name: str
    reached: str
    wanted: str
    verdict: str


@contextlib.contextmanager
def managed(device: Device, nbytes: int, residue: Residue) -> Iterator[GPUResourceManager]:
    place = device.torch_device
    with GPUResourceManager(device, isolation="process", residue=residue, keep_warm=-1, idle_timeout=-1) as manager:
        manager.register(MODEL, lambda: Engine(nbytes, place))
        yield manager


def measured(device: Device, look: Callable[[], Card], nbytes: int, rounds: int) -> Findings:
    found = Findings(nbytes)
    with managed(device, nbytes, "checkpoint") as manager:
        _take_steps(manager, look, found)
        _until_pinned(manager, nbytes)
        found.return_s = statistics.median(_return_seconds(manager) for _ in range(rounds))
    with managed(device, nbytes, "keep") as manager:
        _until_pinned(manager, nbytes)
        found.copy_bytes_per_s = statistics.median(_copy_rate(manager) for _ in range(rounds))
        with manager.lease(MODEL) as engine:
            found.link_bytes_per_s = engine.link_bytes_per_s()
    return found


def _take_steps(manager: GPUResourceManager, look: Callable[[], Card], found: Findings) -> None:
    found.steps[BEFORE] = look()
    with manager.lease(MODEL) as engine:
        found.steps[LOADED] = look()
        found.answers.add(engine())
        found.steps["used"] = look()
    for step in (OFFLOADED, "offloaded and checkpointed, again"):
        manager.offload(MODEL)
        found.steps[step] = look()
        with manager.lease(MODEL) as engine:
            found.steps.setdefault("restored", look())
            found.answers.add(engine())
    manager.release(MODEL)
    found.steps[RELEASED] = look()


def _until_pinned(manager: GPUResourceManager, nbytes: int) -> None:
    """Moves the model until its mirror is pinned, or for ten rounds; pinning runs beside the moves."""
    for _ in range(10):
        with manager.lease(MODEL) as engine:
            if engine.pinned_bytes() >= nbytes:
                return
        manager.offload(MODEL)
        time.sleep(1 if manager.device.kind == "cuda" else 0)


def _return_seconds(manager: GPUResourceManager) -> float:
    manager.offload(MODEL)
    began_s = time.perf_counter()
    with manager.lease(MODEL):
        return time.perf_counter() - began_s


def _copy_rate(manager: GPUResourceManager) -> float:
    _return_seconds(manager)
    move = manager.status()["models"][MODEL]["last_move"]
    assert move is not None
    return move["bytes"] / move["seconds"]


def goals(found: Findings) -> list[Goal]:
    before, loaded, result = found.steps[BEFORE], found.steps[LOADED], []
    lists = bool(loaded.pids - before.pids)  # in containers the driver may list no processes
    counts = loaded.used_bytes >= before.used_bytes + found.nbytes
    for step in (OFFLOADED, RELEASED):
        card = found.steps[step]
        more = card.pids - before.pids
        pids = ", ".join(map(str, sorted(more))) or "none"
        result.append(Goal(f"{step}: processes beyond those before", pids, "none", _verdict(not more, lists)))
        more_bytes = card.used_bytes - before.used_bytes
        shown, wanted = f"{more_bytes / MB:+,.1f} MB", f"<= {SAME_WITHIN_BYTES // MB} MB"
        reached = _verdict(more_bytes <= SAME_WITHIN_BYTES, counts)
        result.append(Goal(f"{step}: used memory beyond that before", shown, wanted, reached))
    large = found.nbytes >= RETURN_GB * GB
    result.append(
        Goal(
            f"checkpointed to ready, {found.nbytes / GB:g} GB", f"{found.return_s:.2f} s",
            f"<= {RETURN_S * found.nbytes / GB / RETURN_GB:.2g} s",
            _verdict(found.return_s <= RETURN_S * found.nbytes / GB / RETURN_GB) if large else "needs --gb 8",
        )
    )  # fmt: skip
    share = found.copy_bytes_per_s / found.link_bytes_per_s
    rates = f"{share:.2f} ({found.copy_bytes_per_s / GB:.1f} of {found.link_bytes_per_s / GB:.1f} GB/s)"
    result.append(Goal("copy from the mirror / pinned link", rates, f">= {OF_LINK}", _verdict(share >= OF_LINK)))
    same = len(found.answers) == 1
    result.append(Goal("answers before and after each move", "equal" if same else "differ", "equal", _verdict(same)))
    return result


def _verdict(reached: bool, seen: bool = True) -> str:
    """``seen``: whether the driver has shown the loaded model at all."""
    return ("yes" if reached else "no") if seen else "not shown by the driver"


def obstacle() -> str | None:
    """Returns why nothing can be measured here; None if it can."""
    missing = DriverCheckpoints().unavailable()
    if missing is not None:
        return missing.en
    device = CudaDevice.find()
    if device is None:
        return "torch finds no NVIDIA GPU. Check nvidia-smi, CUDA_VISIBLE_DEVICES, and that torch is a build with CUDA"
    if not isinstance(device._probe, NvmlProbe):
        return "NVML does not report the GPU. In a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    return None


def look_at(device: CudaDevice) -> Callable[[], Card]:
    def look() -> Card:
        memory = device.memory()
        assert memory.total_bytes is not None
        assert memory.free_bytes is not None
        return Card(frozenset(pid for pid, _ in device._probe.holders()), memory.total_bytes - memory.free_bytes)

    return look


def report(found: Findings) -> bool:
    """Prints both tables; returns whether each goal is reached."""
    before = found.steps[BEFORE]
    print(f"\n{'':40}{'processes':>12}{'used, MB':>12}{'beyond before':>16}")
    for step, card in found.steps.items():
        more_mb = (card.used_bytes - before.used_bytes) / MB
        print(f"{step:40}{len(card.pids):12}{card.used_bytes / MB:12,.1f}{more_mb:+16,.1f}")
    print(f"\n{'':56}{'reached':>30}{'wanted':>12}")
    reached = goals(found)
    for goal in reached:
        print(f"{goal.name:56}{goal.reached:>30}{goal.wanted:>12}  {goal.verdict}")
    return all(goal.verdict != "no" for goal in reached)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=RETURN_GB, help="size of the model in GB of 2**30 bytes (8)")
    parser.add_argument("--rounds", type=int, default=7, help="returns and copies, of which the median counts (7)")
    options = parser.parse_args()
    if (reason := obstacle()) is not None:
        parser.error(f"{reason}.")
    device = CudaDevice.find()
    assert device is not None
    print(
        f"{datetime.date.today()}, {device.name}, driver {'.'.join(map(str, driver_version() or ()))}, torch "
        f"{torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"load average {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    if not report(measured(device, look_at(device), int(options.gb * GB), options.rounds)):
        sys.exit(1)


if __name__ == "__main__":
    main()
