"""Models of the soak test: voices with known answers, and a card and residents with random failures."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from typing import Any

import torch
import xxhash

from gpu_manager import DeviceOutOfMemory
from residency.contracts import Device
from residency.memory import Resident, adopt
from residency.scheduling.managed_model import ManagedModel

from ._meter import Ledger

MB = 1 << 20
KINDS = 7
WITH_SNAPSHOTS = ("tts",)

#: Failure rates: of loads, of moves by name, of restored storages.
RATES = {
    "load raises": 0.06,
    "load hangs": 0.01,
    "restore raises": 0.02,
    "offload raises": 0.01,
    "save raises": 0.02,
    "read raises": 0.02,
    "out of memory": 0.005,
    "listener raises": 0.02,
}


class LoaderBroke(Exception):
    """Error of a loader; raised in all requests that wait for that load."""


class ResidentBroke(Exception):
    """Error of a move."""


class EngineBroke(Exception):
    """Error of an engine during a request."""


class Faults:
    """Random choice, by seed, of the calls that fail. Thread-safe."""

    def __init__(self, seed: int, share: float = 1.0) -> None:
        self._random = random.Random(f"faults {seed}")
        self._lock = threading.Lock()
        self.share = share
        self.struck: Counter[str] = Counter()

    def strikes(self, what: str) -> bool:
        with self._lock:
            struck = self._random.random() < RATES[what] * self.share
            self.struck[what] += struck
            return struck


class FaultyCard(Ledger):
    """Simulated card with spurious out-of-memory errors."""

    def __init__(self, capacity_bytes: int, faults: Faults) -> None:
        super().__init__(capacity_bytes)
        self._faults = faults

    def allocate(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        if self._faults.strikes("out of memory"):
            raise DeviceOutOfMemory(nbytes, None, "A card that takes a day off")
        super().allocate(storage, nbytes)


class FaultyResident:
    """Resident of `adopt` with moves that fail at random before they begin."""

    def __init__(self, inner: Resident, model: str, faults: Faults) -> None:
        self._inner, self._model, self._faults = inner, model, faults

    @property
    def device_bytes(self) -> int:
        return self._inner.device_bytes

    @property
    def host_bytes(self) -> int:
        return self._inner.host_bytes

    def offload(self) -> int:
        self._strike("offload raises")
        return self._inner.offload()

    def restore(self) -> int:
        self._strike("restore raises")
        return self._inner.restore()

    def release(self) -> int:
        return self._inner.release()

    def save(self, store: Any, name: str) -> int:
        if name not in WITH_SNAPSHOTS:
            raise ResidentBroke(f"{name}: this one is not kept on disk")
        self._strike("save raises")
        return self._inner.save(store, name)

    def load(self, store: Any, name: str) -> int:
        self._strike("read raises")
        return self._inner.load(store, name)

    def _strike(self, what: str) -> None:
        if self._faults.strikes(what):
            raise ResidentBroke(f"{self._model}: {what}")


class Voice(torch.nn.Module):
    """Model that answers with digests of all its weights and its output; has a tied weight and a table."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(64, 64, bias=False)
        self.head = torch.nn.Linear(64, 64, bias=False)
        self.embed.weight = torch.nn.Parameter(weights["embed"].clone(), requires_grad=False)
        self.head.weight = self.embed.weight
        self.register_buffer("body", weights["body"].clone())
        self.table = {"half": weights["half"].clone()}

    def speak(self, kind: int) -> tuple[int, int, int, int]:
        heard = self.head(self.embed(torch.linspace(-1, 1, 64) * (1 + kind)))
        parts = (heard, self.embed.weight, self.body, self.table["half"])
        return tuple(_digest(part) for part in parts)  # type: ignore[return-value]


class Model:
    """One model: its loader, and the expected answers of its engine."""

    def __init__(self, name: str, number: int, megabytes: float, faults: Faults, hang_s: float) -> None:
        generator = torch.Generator().manual_seed(number)
        self._weights = {
            "embed": torch.randn(64, 64, generator=generator),
            "body": torch.randn(int(megabytes * MB) // 4, generator=generator),
            "half": torch.randn(100, generator=generator).to(torch.bfloat16),
        }
        self.name = name
        self.size_bytes = sum(tensor.nbytes for tensor in self._weights.values())
        self.expected = [Voice(self._weights).speak(kind) for kind in range(KINDS)]
        self.busy = threading.Lock()  # held inside the engine
        self._faults, self._hang_s = faults, hang_s

    def load(self) -> Voice:
        if self._faults.strikes("load raises"):
            raise LoaderBroke(self.name)
        if self._faults.strikes("load hangs"):
            time.sleep(self._hang_s)
        return Voice(self._weights)


def adopter(faults: Faults) -> Any:
    """Returns an ``adopt`` for the manager whose residents fail at random."""

    def faulty(engine: Any, device: Device, managed: ManagedModel) -> FaultyResident:
        return FaultyResident(adopt(engine, device, managed), managed.name, faults)

    return faulty


def _digest(tensor: torch.Tensor) -> int:
    return xxhash.xxh3_64_intdigest(tensor.detach().contiguous().view(torch.uint8).numpy())
