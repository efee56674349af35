"""Devices, and the choice of the best one. Importing this imports no torch and touches no GPU."""

from __future__ import annotations

from ..contracts import Device
from .cpu import CpuDevice
from .cuda import CudaDevice
from .simulated import SimulatedDevice

__all__ = ["CpuDevice", "CudaDevice", "SimulatedDevice", "find_device"]


def find_device(pinned_limit_bytes: int | None = None) -> Device:
    """The GPU that torch would take as ``cuda``, or the CPU where there is none that it could use.

    ``pinned_limit_bytes`` bounds the main memory that is locked for fast copies; None is no bound. Asks NVML and the
    version of the installed torch; neither imports torch nor creates a CUDA context.
    """
    return CudaDevice.find(pinned_limit_bytes) or CpuDevice()
