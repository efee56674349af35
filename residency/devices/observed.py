"""A device that only worker processes use: the manager's process observes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..contracts import Device, Memory, Telemetry
from .cpu import CpuDevice


class ObservedDevice(CpuDevice):
    """Sizes and names of ``device``, without anything that computes there or creates a CUDA context.

    Always usable, and holds no tensors of this process: a worker that cannot use the device is replaced.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.kind, self.name, self.note = device.kind, device.name, device.note
        self.torch_device, self.separate = device.torch_device, device.separate
        self.identity = device.identity

    def __getattr__(self, name: str) -> Any:
        if name == "_device":
            raise AttributeError(name)
        return getattr(self._device, name)

    def memory(self) -> Memory:
        """A process without a CUDA context is not among those that the driver lists, and has 0 bytes there."""
        memory = self._device.memory()
        return replace(memory, process_bytes=0) if self.kind == "cuda" else memory

    def held_by(self) -> Mapping[int, int] | None:
        return self._device.held_by()

    def holders(self) -> Sequence[tuple[int, int | None]]:
        return self._device.holders()

    def bytes_of(self, pids: Collection[int]) -> int | None:
        return self._device.bytes_of(pids)

    def worker_bytes(self, host_bytes: Mapping[int, int], awake: bool) -> tuple[int, int] | None:
        return self._device.worker_bytes(host_bytes, awake)

    def telemetry(self) -> Telemetry:
        return self._device.telemetry()
