"""GPU memory through NVML, the driver's own books. Unlike ``torch.cuda.mem_get_info`` it costs no CUDA context."""

from __future__ import annotations

import os
from typing import Any

import psutil
import pynvml

from ..contracts import Memory, Telemetry

_OURS = ("--enable-gpu-management", "gpu_manager", "tts_gpu_managed")


class NvmlProbe:
    """One GPU. Thread-safe, as NVML is. Make one with `find`."""

    def __init__(self, handle: Any, name: str) -> None:
        self._handle = handle
        self.name = name

    @classmethod
    def find(cls, visible: str | None = None) -> NvmlProbe | None:
        """The first GPU that CUDA would see (``visible`` or ``CUDA_VISIBLE_DEVICES``); None if there is none.

        Numbers are taken in the order of PCI buses, as NVML counts; set ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` for
        CUDA to count alike. UUIDs (``GPU-...``) need no order.
        """
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if visible is None else visible
        first = visible.split(",")[0].strip()
        try:
            pynvml.nvmlInit()
            if first.startswith(("GPU-", "MIG-")):
                handle = pynvml.nvmlDeviceGetHandleByUUID(first)
            else:
                handle = pynvml.nvmlDeviceGetHandleByIndex(int(first))
            name = pynvml.nvmlDeviceGetName(handle)
        except (pynvml.NVMLError, ValueError):
            # ValueError: an empty list or a negative number hides every GPU, as in CUDA.
            return None
        return cls(handle, name.decode() if isinstance(name, bytes) else name)

    def memory(self) -> Memory:
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(self._handle)
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except pynvml.NVMLError:
            return Memory()
        own = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
        # In containers the driver lists the host's process numbers, or none: then what we use is unknown.
        process_bytes = None if own and own[0] is None else sum(own) if own or not processes else None
        return Memory(memory.total, memory.free, process_bytes)

    def telemetry(self) -> Telemetry:
        try:
            power_w = pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
        except pynvml.NVMLError:
            power_w = None
        sizes = [nbytes for pid, nbytes in self.holders() if pid != os.getpid() and _is_ours(pid)]
        return Telemetry(None if None in sizes else sum(filter(None, sizes)), power_w)

    def holders(self) -> tuple[tuple[int, int | None], ...]:
        """The processes that hold memory of this GPU: (pid, bytes or None where the driver does not tell)."""
        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except pynvml.NVMLError:
            return ()
        return tuple((process.pid, process.usedGpuMemory) for process in processes)


def _is_ours(pid: int) -> bool:
    """Whether a process runs this project, as far as its command line tells."""
    try:
        return any(sign in argument for argument in psutil.Process(pid).cmdline() for sign in _OURS)
    except (psutil.Error, OSError):
        return False
