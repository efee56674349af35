"""Which device is taken, with NVML and torch's version played by the test."""

from __future__ import annotations

import importlib.metadata
import types
from typing import Any

import pynvml
import pytest
import torch

from residency.devices import CpuDevice, CudaDevice, find_device
from residency.errors import OnAnotherDevice

GIB = 1 << 30


class FakeNvml:
    """Two cards as NVML shows them; a process of ours on the second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, processes: list) -> None:
        self.processes = processes
        for name in ("nvmlInit", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetName",
                     "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetComputeRunningProcesses"):  # fmt: skip
            monkeypatch.setattr(pynvml, name, getattr(self, name))

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if not 0 <= index < 2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return f"card {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return f"card {uuid}"

    def nvmlDeviceGetName(self, handle: str) -> str:
        return f"NVIDIA {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> object:
        return pynvml.c_nvmlMemory_t(total=80 * GIB, free=70 * GIB, used=10 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list:
        return self.processes


class Process:
    def __init__(self, pid: int, used: int | None) -> None:
        self.pid, self.usedGpuMemory = pid, used


@pytest.fixture
def torch_version(monkeypatch: pytest.MonkeyPatch):
    def pretend(version: str) -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)

    return pretend


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("0", "NVIDIA card 0"), ("1,0", "NVIDIA card 1"), ("GPU-8f2a", "NVIDIA card GPU-8f2a"), ("", "CPU"), ("-1", "CPU"),
     ("9", "CPU")],
)  # fmt: skip
def test_the_first_visible_gpu_is_taken(visible: str, expected: str, torch_version, monkeypatch) -> None:
    FakeNvml(monkeypatch, [])
    torch_version("2.13.0+cu130")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_device().name == expected


def test_a_torch_without_cuda_means_the_cpu(torch_version, monkeypatch) -> None:
    FakeNvml(monkeypatch, [])
    torch_version("2.13.0+cpu")
    assert isinstance(find_device(), CpuDevice)


@pytest.mark.parametrize(
    ("processes", "own"),
    [
        ([], 0),
        ([Process(-5, 10 * GIB)], None),
        ([Process(0, 3 * GIB), Process(-5, 7 * GIB)], 3 * GIB),
        ([Process(0, None)], None),
    ],
)
def test_memory_is_what_the_driver_says_and_none_where_it_does_not_know(
    processes, own, torch_version, monkeypatch
) -> None:
    import os

    for process in processes:
        process.pid = os.getpid() if process.pid == 0 else process.pid
    FakeNvml(monkeypatch, processes)
    torch_version("2.13.0+cu130")
    device = CudaDevice.find()
    assert device is not None
    memory = device.memory()
    assert (memory.total_bytes, memory.free_bytes, memory.process_bytes) == (80 * GIB, 70 * GIB, own)


def test_a_driver_that_fails_later_makes_the_numbers_unknown(torch_version, monkeypatch) -> None:
    FakeNvml(monkeypatch, [])
    torch_version("2.13.0+cu130")
    device = CudaDevice.find()

    def lost(handle: str) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lost)
    assert device.memory().free_bytes is None


def test_tensors_on_another_gpu_than_the_managed_one_are_refused(torch_version, monkeypatch) -> None:
    FakeNvml(monkeypatch, [])
    torch_version("2.13.0+cu130")
    device = find_device()

    def tensor(where: str) -> Any:
        return types.SimpleNamespace(is_cuda=where != "cpu", device=torch.device(where))

    assert [device.holds_tensor(tensor(where)) for where in ("cpu", "cuda:0")] == [False, True]
    with pytest.raises(OnAnotherDevice, match=r"cuda:1.*CUDA_VISIBLE_DEVICES=0"):
        device.holds_tensor(tensor("cuda:1"))
