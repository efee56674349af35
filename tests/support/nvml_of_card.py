"""NVML for a simulated card with a name: the driver's answers are what the books of the card say at that moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pynvml
import pytest

from gpu_manager import CudaDevice, SimulatedDevice
from residency.devices.card_probes import NvmlProbe


class Process:
    def __init__(self, pid: int, nbytes: int | None) -> None:
        self.pid, self.usedGpuMemory = pid, nbytes


class NvmlOfCard:
    """Replaces the functions of pynvml.

    ``fails``: the error code of a function by its name. ``sizes``: whether the driver tells how much a process holds.
    ``number``: the pid under which the driver lists a process, as in a container that of the host. ``draw``: the pids
    of programs that only draw.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, books: SimulatedDevice, uuid: str) -> None:
        self._books, self._uuid = books, uuid
        self.fails: dict[str, int] = {}
        self.sizes = True
        self.number: Callable[[int], int] = lambda pid: pid
        self.draw = set[int]()
        for name in ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetMigMode"):
            self.fails[name] = pynvml.NVML_ERROR_NOT_SUPPORTED
        answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByIndex": lambda index: "card",
            "nvmlDeviceGetName": lambda handle: "Card of the test",
            "nvmlDeviceGetUUID": lambda handle: self._uuid,
            "nvmlDeviceGetMemoryInfo": self._memory,
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: self._processes(draws=False),
            "nvmlDeviceGetGraphicsRunningProcesses": lambda handle: self._processes(draws=True),
        }
        for name in {*answers, *self.fails}:
            monkeypatch.setattr(pynvml, name, self._call(name, answers.get(name)))

    def _call(self, name: str, answer: Callable[..., Any] | None) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if name in self.fails:
                raise pynvml.NVMLError(self.fails[name])
            assert answer is not None
            return answer(*arguments)

        return call

    def _memory(self, handle: str) -> object:
        memory = self._books.memory()
        total, free = memory.total_bytes or 0, memory.free_bytes or 0
        return pynvml.c_nvmlMemory_t(total=total, free=free, used=total - free)

    def _processes(self, draws: bool) -> list[Process]:
        return [
            Process(self.number(pid), nbytes if self.sizes else None)
            for pid, nbytes in self._books.holders()
            if (pid in self.draw) is draws
        ]


class CardByNvml(SimulatedDevice):
    """A simulated card whose sizes and processes are read as those of a `CudaDevice`; its bytes move in main memory."""

    kind = "cuda"
    memory, holders, held_by, bytes_of = CudaDevice.memory, CudaDevice.holders, CudaDevice.held_by, CudaDevice.bytes_of
    worker_bytes, telemetry = CudaDevice.worker_bytes, CudaDevice.telemetry

    def __init__(self, capacity_bytes: int, shared: str) -> None:
        super().__init__(capacity_bytes, shared=shared)
        probe = NvmlProbe.find()
        assert probe is not None
        self.index, self._probe, self.identity = 0, probe, probe.identity

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process uses the same card; the manager's process alone asks the driver."""
        return SimulatedDevice, (self.capacity_bytes, None, 0, self.identity.removeprefix("GPU-"))
