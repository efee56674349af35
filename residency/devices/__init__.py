"""Devices, and the choice of the best one. The import loads no torch and uses no GPU."""

from __future__ import annotations

from ..contracts import Device
from .cpu import CpuDevice, SimulatedDevice
from .cuda import CudaDevice
from .simulated_checkpoints import SimulatedCheckpoints

__all__ = ["CpuDevice", "CudaDevice", "SimulatedCheckpoints", "SimulatedDevice", "find_device"]


def find_device(pinned_limit_bytes: int | None = None) -> Device:
    """Returns the first visible GPU (torch's ``cuda:0``), or the CPU if torch can use no GPU.

    ``pinned_limit_bytes`` limits pinned main memory; None: no limit. Uses NVML and the version of the installed torch;
    imports no torch and creates no CUDA context.
    """
    return CudaDevice.find(pinned_limit_bytes) or CpuDevice()
