"""Devices in main memory: the CPU, and a simulated card for trials and tests without a GPU."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from ..contracts import Device, DeviceKind, Memory, Telemetry
from ..errors import DeviceLost, DeviceOutOfMemory
from ..locks import renewed_in_children
from ..sentences import Sentence
from ..units import readable_bytes

if TYPE_CHECKING:
    import torch


class CpuDevice(Device):
    """Machine without a GPU: device and host share one memory. Weights do not move, only release frees memory."""

    kind: DeviceKind = "cpu"
    name = "CPU"
    torch_device = "cpu"
    separate = False
    note: dict[str, str] | None = {  # noqa: RUF012 - never changed
        "en": "No GPU here: models run in main memory. Offload saves nothing; release frees main memory.",
        "zh": "本机没有 GPU：模型在内存中运行。卸载不会节省任何资源；释放可以腾出内存。",
    }

    def memory(self) -> Memory:
        return Memory()

    def held_by(self) -> Mapping[int, int] | None:
        return {}

    def worker_bytes(self, host_bytes: Mapping[int, int], awake: bool) -> tuple[int, int] | None:
        return 0, sum(host_bytes.values())

    def telemetry(self) -> Telemetry:
        return Telemetry()

    def is_usable(self) -> bool:
        return True

    def holds_tensor(self, tensor: torch.Tensor) -> bool:
        return False

    def holds_session(self, providers: Sequence[str]) -> bool:
        return False

    def placing(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def transfer(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def pin(self, raw: torch.Tensor) -> bool:
        return False


class SimulatedDevice(CpuDevice):
    """Simulated GPU of ``capacity_bytes``. Thread-safe. ``ledger_bytes``: memory held by models now.

    Bytes are actually freed and copied, in main memory, so that ties, views, leaks and out-of-memory behave as on a
    card. Not simulated: bandwidth, pinning, streams and the CUDA allocator.

    ``failure`` is for tests: the message of an error raised by every call from then on, as on a real card once CUDA has
    failed; None (the default): the card works.
    """

    kind: DeviceKind = "simulated"
    separate = True
    note: dict[str, str] | None = {  # noqa: RUF012 - never changed
        "en": "Simulated GPU: moves are real, but in main memory. No GPU memory is used or saved.",
        "zh": "模拟 GPU：搬移是真实的，但发生在内存中，不占用也不节省真正的显存。",
    }

    def __init__(self, capacity_bytes: int, pinned_limit_bytes: int | None = None) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes must be positive, not {capacity_bytes}")
        self.capacity_bytes = capacity_bytes
        self.pinned_limit_bytes = pinned_limit_bytes
        self.pinned_bytes = 0
        size = readable_bytes(capacity_bytes)
        english = f"Simulated GPU ({size})"
        self.name: str = Sentence(english, f"模拟 GPU（{size}）", whole=f"{english} / 模拟 GPU")
        self.failure: str | None = None
        self.ledger_bytes = 0
        self._reported: dict[int, int] = {}
        # Reentrant: garbage collection may call `unpin` in a locked block.
        self._lock = renewed_in_children(threading.RLock())

    def memory(self) -> Memory:
        with self._lock:
            used, reported = self.ledger_bytes, sum(self._reported.values())
        return Memory(self.capacity_bytes, max(0, self.capacity_bytes - used - reported), used)

    def held_by(self) -> Mapping[int, int] | None:
        with self._lock:
            own = os.getpid()
            return self._reported | {own: self.ledger_bytes + self._reported.get(own, 0)}

    def report_outside(self, pid: int, nbytes: int) -> None:
        """Sets the bytes of the card held by a process in addition to the models; 0: none.

        For tests, and for engines with worker processes.
        """
        with self._lock:
            self._reported[pid] = nbytes

    def worker_bytes(self, host_bytes: Mapping[int, int], awake: bool) -> tuple[int, int] | None:
        """Counts the main memory of workers as memory of the card while they are awake, or if they free none of it."""
        with self._lock:
            total_bytes = sum(host_bytes.values())
            if not awake:
                awake = total_bytes > 0.95 * sum(self._reported.get(pid, 0) for pid in host_bytes) > 0
            self._reported.update({pid: nbytes if awake else 0 for pid, nbytes in host_bytes.items()})
        return (total_bytes, 0) if awake else (0, total_bytes)

    def ensure_usable(self) -> None:
        if self.failure is not None:
            raise DeviceLost(self.failure)

    def is_usable(self) -> bool:
        return self.failure is None

    def holds_tensor(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu"

    def holds_session(self, providers: Sequence[str]) -> bool:
        return True

    def charge(self, nbytes: int) -> None:
        with self._lock:
            free_bytes = self.capacity_bytes - self.ledger_bytes
            if self._reported:
                free_bytes = max(0, free_bytes - sum(self._reported.values()))
            if nbytes > free_bytes:
                raise DeviceOutOfMemory(nbytes, free_bytes, self.name)
            self.ledger_bytes += nbytes

    def refund(self, nbytes: int) -> None:
        with self._lock:
            self.ledger_bytes -= nbytes

    def allocate(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        self._fail_if_lost()
        self.charge(nbytes)
        try:
            _resize()(storage, nbytes)
        except BaseException:
            self.refund(nbytes)
            raise

    def drop(self, storage: torch.UntypedStorage) -> None:
        nbytes = storage.nbytes()
        _resize()(storage, 0)
        self.refund(nbytes)

    def pin(self, raw: torch.Tensor) -> bool:
        """Counts the bytes; returns false beyond ``pinned_limit_bytes``."""
        nbytes = len(raw)
        with self._lock:
            if self.pinned_limit_bytes is not None and self.pinned_bytes + nbytes > self.pinned_limit_bytes:
                return False
            self.pinned_bytes += nbytes
            return True

    def unpin(self, raw: torch.Tensor) -> None:
        with self._lock:
            self.pinned_bytes -= len(raw)

    def wait(self) -> None:
        self._fail_if_lost()

    def settle(self) -> None:
        self._fail_if_lost()

    def _fail_if_lost(self) -> None:
        if self.failure is not None:
            raise RuntimeError(f"CUDA error: {self.failure}")


@functools.cache
def _resize() -> Callable[[torch.UntypedStorage, int], object]:
    """Resizes guarded storages as well: see `residency.memory.absent_tensors`."""
    import torch

    return torch.UntypedStorage.resize_
