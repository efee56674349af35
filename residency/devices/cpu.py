"""Devices in main memory: the CPU, and a simulated card for trials and tests without a GPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from ..contracts import Device, DeviceKind, Memory, Telemetry
from ..errors import DeviceLost, DeviceOutOfMemory, InvalidInput
from ..sentences import Sentence
from ..units import readable_bytes
from .ledger import Ledger
from .named_cards import books_of

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

    def holders(self) -> Sequence[tuple[int, int | None]]:
        return ()

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
    """Simulated GPU of ``capacity_bytes``. Thread-safe.

    A process that unpickles it uses the same card, with books of its own bytes; `memory`, `held_by` and
    ``ledger_bytes`` are those of all processes. Each takes ``context_bytes`` at its first use of the card, until it
    ends or is checkpointed. While it is checkpointed, its calls wait, as those of CUDA do.

    ``shared``: a name, with which other programs of this user on this machine use the same card (Linux).

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

    def __init__(
        self,
        capacity_bytes: int,
        pinned_limit_bytes: int | None = None,
        context_bytes: int = 0,
        shared: str | None = None,
    ) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes must be positive, not {capacity_bytes}")
        if not 0 <= context_bytes < capacity_bytes:
            raise ValueError(f"context_bytes must be from 0 to less than the capacity, not {context_bytes}")
        self.capacity_bytes = capacity_bytes
        self.context_bytes = context_bytes
        self.pinned_limit_bytes = pinned_limit_bytes
        self.pinned_bytes = 0
        size = readable_bytes(capacity_bytes)
        english = f"Simulated GPU ({size})"
        self.name: str = Sentence(english, f"模拟 GPU（{size}）", whole=f"{english} / 模拟 GPU")
        self.failure: str | None = None
        self.identity = f"simulated-{shared or os.getpid()}"
        self.is_shared = shared is not None
        self.ledger = self._named_ledger(shared) if shared else Ledger()

    def _named_ledger(self, name: str) -> Ledger:
        ledger = books_of(name, self.capacity_bytes)
        if ledger.capacity_bytes != self.capacity_bytes:
            size, other = readable_bytes(self.capacity_bytes), readable_bytes(ledger.capacity_bytes)
            raise InvalidInput(
                f"the simulated GPU {name!r} exists with {other}, not {size}: use that size, or another name",
                f"模拟 GPU {name!r} 已存在，容量为 {other} 而非 {size}：请使用该容量，或换一个名称",
            )
        return ledger

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "pinned_bytes": 0}

    @property
    def ledger_bytes(self) -> int:
        """Bytes on the card that models hold now."""
        return self.ledger.locked(Ledger.sizes)[1]

    def memory(self) -> Memory:
        held_bytes, charged_bytes, context_bytes = self.ledger.locked(Ledger.sizes)
        free_bytes = max(0, self.capacity_bytes - held_bytes)
        return Memory(self.capacity_bytes, free_bytes, charged_bytes + context_bytes)

    def held_by(self) -> Mapping[int, int] | None:
        return {os.getpid(): 0} | self.ledger.locked(Ledger.by_process)

    def holders(self) -> Sequence[tuple[int, int | None]]:
        return tuple(self.ledger.locked(Ledger.by_process).items())

    def bytes_of(self, pids: Collection[int]) -> int | None:
        held = self.ledger.locked(Ledger.by_process)
        return sum(held.get(pid, 0) for pid in pids)

    def telemetry(self) -> Telemetry:
        held_bytes, charged_bytes, context_bytes = self.ledger.locked(Ledger.sizes)
        own_bytes = charged_bytes + context_bytes
        return Telemetry(peers_bytes=held_bytes - own_bytes if self.is_shared else None)

    def ended(self, pid: int) -> None:
        """Takes the bytes of a process that has ended off the card."""
        self.ledger.locked(Ledger.drop, pid)

    def report_outside(self, pid: int, nbytes: int) -> None:
        """Sets the bytes of the card held by a process in addition to the models; 0: none.

        For tests, and for engines with worker processes.
        """
        self.ledger.locked(Ledger.report, pid, nbytes)

    def worker_bytes(self, host_bytes: Mapping[int, int], awake: bool) -> tuple[int, int] | None:
        """Counts the main memory of workers as memory of the card while they are awake, or if they free none of it."""
        total_bytes = sum(host_bytes.values())
        awake = self.ledger.locked(Ledger.report_workers, host_bytes, awake)
        return (total_bytes, 0) if awake else (0, total_bytes)

    def ensure_usable(self) -> None:
        """Takes the context of this process."""
        if self.failure is not None:
            raise DeviceLost(self.failure)
        self._take(0)

    def is_usable(self) -> bool:
        return self.failure is None

    def holds_tensor(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu"

    def holds_session(self, providers: Sequence[str]) -> bool:
        return True

    def charge(self, nbytes: int) -> None:
        ledger = self.ledger
        with ledger.lock:
            if ledger.alone:  # quicker, for many small tensors
                charged, context_bytes = ledger.charged[0] + nbytes, ledger.context[0]
                free_bytes = self.capacity_bytes - charged - ledger.reported[0] - context_bytes
                if free_bytes >= 0 and context_bytes == self.context_bytes:
                    ledger.charged[0] = charged
                    return
        self._take(nbytes)

    def refund(self, nbytes: int) -> None:
        ledger = self.ledger
        with ledger.lock:
            if ledger.alone:
                ledger.charged[0] -= nbytes
                return
        ledger.used(Ledger.give, nbytes)

    def _take(self, nbytes: int) -> None:
        """Charges bytes and, at the first use by this process, its context."""
        short = self.ledger.used(Ledger.take, nbytes, self.context_bytes, self.capacity_bytes)
        if short is not None:
            raise self.full(*short)

    def full(self, needed_bytes: int, free_bytes: int) -> DeviceOutOfMemory:
        """Returns the error of a full card, with the processes that hold it if others than this one do."""
        held = self.ledger.locked(Ledger.by_process)
        holders = tuple(held.items()) if held.keys() - {os.getpid()} else ()
        return DeviceOutOfMemory(needed_bytes, free_bytes, self.name, holders)

    def allocate(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        if self.failure is not None:
            raise RuntimeError(f"CUDA error: {self.failure}")
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
        with self.ledger.lock:
            if self.pinned_limit_bytes is not None and self.pinned_bytes + nbytes > self.pinned_limit_bytes:
                return False
            self.pinned_bytes += nbytes
            return True

    def unpin(self, raw: torch.Tensor) -> None:
        with self.ledger.lock:
            self.pinned_bytes -= len(raw)

    def wait(self) -> None:
        if self.failure is not None:
            raise RuntimeError(f"CUDA error: {self.failure}")
        self.ledger.used(lambda *_: None)

    def settle(self) -> None:
        self.wait()


@functools.cache
def _resize() -> Callable[[torch.UntypedStorage, int], object]:
    """Resizes guarded storages as well: see `residency.memory.absent_tensors`."""
    import torch

    return torch.UntypedStorage.resize_
