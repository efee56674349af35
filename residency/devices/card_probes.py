"""Measures one card, through NVML or torch: None where unknown. Never raises, creates no CUDA context."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import pynvml

from ..contracts import Memory, Telemetry
from ..locks import renewed_in_children
from ..modules import imported

_OURS = ("--enable-gpu-management", "gpu_manager", "tts_gpu_managed", "residency.workers")
#: Newer versions of pynvml raise the second one for drivers before 510, older ones do not have it.
_NO_LIST = (pynvml.NVMLError, getattr(pynvml, "NVMLLibraryMismatchError", pynvml.NVMLError))
_NO_SUCH_CARD = (pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.NVML_ERROR_NOT_FOUND)


class NvmlUnavailable(Exception):
    """NVML is not usable: no library or driver, or no permission. A GPU may still exist."""


class EnergyMeter:
    """Adds up the energy that a card draws: by its counter or, without one, by its power at each reading."""

    def __init__(self) -> None:
        self._drawn_j = 0.0
        self._counter_j: float | None = None
        self._power: tuple[float, float] | None = None  # time in seconds, watts

    def read(self, now_s: float, counter_j: float | None, power_w: float | None) -> float | None:
        """Takes a reading (None where unknown); returns the watt-hours since the first one, None if all is unknown."""
        if counter_j is not None and self._counter_j is not None:
            self._drawn_j += max(0.0, counter_j - self._counter_j)  # a driver that is reloaded begins at 0
        elif power_w is not None and self._power is not None and self._counter_j is None:
            self._drawn_j += (power_w + self._power[1]) / 2 * (now_s - self._power[0])
        self._counter_j = self._counter_j if counter_j is None else counter_j
        self._power = None if power_w is None else (now_s, power_w)
        return None if self._counter_j is None and power_w is None else self._drawn_j / 3600


class NvmlProbe:
    """One GPU, or one MIG instance; created by `find`. Thread-safe, like NVML."""

    def __init__(self, handle: Any, name: str) -> None:
        self._handle = handle
        self.name = name
        self.identity = _uuid(handle)
        self._meter = EnergyMeter()
        self._reading = renewed_in_children(threading.Lock())  # readings of the meter come in order
        self._power_and_energy()

    @classmethod
    def find(cls, visible: str | None = None) -> NvmlProbe | None:
        """Finds the first GPU visible to CUDA; returns None if there is none, raises `NvmlUnavailable` if unknown.

        ``visible``: value of ``CUDA_VISIBLE_DEVICES``, None if not set. Indices are in NVML's order, by PCI bus; set
        ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` for the same order in CUDA. UUIDs (``GPU-...``, ``MIG-...``) may be
        abbreviated. Of a GPU with MIG, takes the first instance, like CUDA.
        """
        first = "0" if visible is None else visible.split(",")[0].strip()
        try:
            pynvml.nvmlInit()
            handle = _by_uuid(first) if first.startswith(("GPU-", "MIG-")) else _by_index(int(first))
            if handle is None:
                return None
            handle = next(_instances(handle), handle)
            name = pynvml.nvmlDeviceGetName(handle)
        except ValueError:  # neither a number nor a UUID: hides every GPU, as in CUDA
            return None
        except pynvml.NVMLError as error:
            raise NvmlUnavailable(str(error)) from error
        return cls(handle, _text(name))

    def memory(self) -> Memory:
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(self._handle)
        except pynvml.NVMLError:
            return Memory()
        processes = self._processes(pynvml.nvmlDeviceGetComputeRunningProcesses)
        own = [nbytes for pid, nbytes in processes or () if pid == os.getpid()]
        # In containers the driver lists the host's pids, or none: then this process's use is unknown.
        unknown = processes is None or None in own or (processes and not own)
        return Memory(memory.total, memory.free, None if unknown else sum(filter(None, own)))

    def telemetry(self) -> Telemetry:
        sizes = [nbytes for pid, nbytes in self.holders() if _is_peer(pid)]
        return Telemetry(None if None in sizes else sum(filter(None, sizes)), *self._power_and_energy())

    def _power_and_energy(self) -> tuple[float | None, float | None]:
        """Returns the power draw in watts, and the watt-hours since the first call; None where unknown."""
        with self._reading:
            power_w = self._thousandths(pynvml.nvmlDeviceGetPowerUsage)
            counter_j = self._thousandths(pynvml.nvmlDeviceGetTotalEnergyConsumption)
            return power_w, self._meter.read(time.monotonic(), counter_j, power_w)

    def _thousandths(self, ask: Callable[[Any], int]) -> float | None:
        try:
            return ask(self._handle) / 1000
        except pynvml.NVMLError:
            return None

    def holders(self) -> tuple[tuple[int, int | None], ...]:
        """Returns the processes that hold memory of this GPU: (pid, bytes or None if unknown)."""
        processes = self._processes(pynvml.nvmlDeviceGetComputeRunningProcesses)
        if processes is None:
            return ()
        # One that computes and draws is in both lists. MIG instances have no list of those that draw.
        return tuple(dict([*(self._processes(pynvml.nvmlDeviceGetGraphicsRunningProcesses) or ()), *processes]).items())

    def _processes(self, ask: Callable[[Any], Any]) -> tuple[tuple[int, int | None], ...] | None:
        try:
            return tuple((process.pid, process.usedGpuMemory) for process in ask(self._handle))
        except _NO_LIST:  # as in WSL2 and on virtual GPUs
            return None


class TorchProbe:
    """Sizes of ``cuda:0`` from torch, once it has a CUDA context: the fallback without NVML."""

    name = "CUDA GPU 0"
    identity = "cuda-0"

    def memory(self) -> Memory:
        torch = imported("torch")
        try:
            if torch is None or not torch.cuda.is_initialized() or not torch._C._cuda_hasPrimaryContext(0):
                return Memory()
            free_bytes, total_bytes = torch.cuda.mem_get_info(0)
        except RuntimeError:  # the device is gone
            return Memory()
        return Memory(total_bytes, free_bytes)

    def telemetry(self) -> Telemetry:
        return Telemetry()

    def holders(self) -> tuple[tuple[int, int | None], ...]:
        return ()


CardProbe = NvmlProbe | TorchProbe


def driver_version() -> tuple[int, ...] | None:
    """Returns the version of the NVIDIA driver, such as (570, 86, 10); None if NVML finds none."""
    try:
        pynvml.nvmlInit()
        return tuple(map(int, _text(pynvml.nvmlSystemGetDriverVersion()).split(".")))
    except (pynvml.NVMLError, ValueError):
        return None


def _by_index(index: int) -> Any:
    try:
        return pynvml.nvmlDeviceGetHandleByIndex(index)
    except pynvml.NVMLError as error:
        if error.value in _NO_SUCH_CARD:
            return None
        raise


def _by_uuid(uuid: str) -> Any:
    """Returns the card or instance with that UUID or, if unique, UUID prefix."""
    with suppress(pynvml.NVMLError):  # NVML accepts complete UUIDs only
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    cards = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    candidates = [one for card in cards for one in (card, *_instances(card))]
    found = [one for one in candidates if _text(pynvml.nvmlDeviceGetUUID(one)).startswith(uuid)]
    return found[0] if len(found) == 1 else None


def _instances(card: Any) -> Iterator[Any]:
    """Yields the MIG instances of a card, in order."""
    try:
        count = pynvml.nvmlDeviceGetMaxMigDeviceCount(card) if pynvml.nvmlDeviceGetMigMode(card)[0] else 0
    except pynvml.NVMLError:  # a card or driver without MIG, or an instance
        return
    for index in range(count):
        with suppress(pynvml.NVMLError):  # unused index
            yield pynvml.nvmlDeviceGetMigDeviceHandleByIndex(card, index)


def _uuid(handle: Any) -> str:
    try:
        return _text(pynvml.nvmlDeviceGetUUID(handle))
    except pynvml.NVMLError:
        return "cuda-unknown"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _is_peer(pid: int) -> bool:
    """Returns whether a process runs this project, by its command line, and is neither this one nor a descendant."""
    try:
        process = psutil.Process(pid)
        ours = any(sign in argument for argument in process.cmdline() for sign in _OURS)
        return ours and os.getpid() not in (pid, *(each.pid for each in process.parents()))
    except (psutil.Error, OSError):
        return False
