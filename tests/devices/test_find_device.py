"""Which device is taken, with NVML and torch's version played by the test."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pynvml
import pytest
import torch

from residency.contracts import Memory, Telemetry
from residency.devices import CpuDevice, CudaDevice, cuda, find_device
from residency.devices.card_probes import EnergyMeter, TorchProbe
from residency.errors import OnAnotherDevice

GIB = 1 << 30
UUIDS = {"GPU-8f2a1111": "card 0", "GPU-8f3b2222": "card 1", "MIG-aaaa1": "instance 2", "MIG-aabb2": "instance 5"}


class FakeNvml:
    """Two cards as NVML shows them; a process of ours on the second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, processes: list) -> None:
        self.processes = processes
        self.drawing: list = []
        self.divided = False  # the second card, into two instances (MIG)
        for name in [name for name in dir(self) if name.startswith("nvml")]:
            monkeypatch.setattr(pynvml, name, getattr(self, name))

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if not 0 <= index < 2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return f"card {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in UUIDS:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return UUIDS[uuid]

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return next(uuid for uuid, known in UUIDS.items() if known == handle)

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        if handle not in ("card 0", "card 1"):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(self.divided and handle == "card 1"), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:
        if index not in (2, 5):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return f"instance {index}"

    def nvmlDeviceGetName(self, handle: str) -> str:
        return f"NVIDIA {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> object:
        return pynvml.c_nvmlMemory_t(total=80 * GIB, free=70 * GIB, used=10 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list:
        return self.processes

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: str) -> list:
        return self.drawing


class Process:
    def __init__(self, pid: int, used: int | None) -> None:
        self.pid, self.usedGpuMemory = pid, used


@pytest.fixture
def torch_version(monkeypatch: pytest.MonkeyPatch):
    def pretend(version: str) -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)

    return pretend


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says which devices of the driver there are, and what CUDA_VISIBLE_DEVICES is (None: not set)."""

    def pretend(files: list[str], visible: str | None) -> None:
        monkeypatch.setattr(cuda, "_gpu_files", lambda: files)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return pretend


def no_library() -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, "NVIDIA card 0"), ("0", "NVIDIA card 0"), ("1,0", "NVIDIA card 1"), ("GPU-8f3b2222", "NVIDIA card 1"),
     ("GPU-8f3", "NVIDIA card 1"), ("GPU-8f", "CPU"), ("GPU-77", "CPU"), ("MIG-aaaa1", "NVIDIA instance 2"),
     ("", "CPU"), ("-1", "CPU"), ("9", "CPU"), ("first", "CPU")],
)  # fmt: skip
def test_the_first_visible_gpu_is_taken(visible: str | None, expected: str, torch_version, system, monkeypatch) -> None:
    FakeNvml(monkeypatch, [])
    torch_version("2.13.0+cu130")
    system([], visible)
    assert find_device().name == expected


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("1", "instance 2"), ("GPU-8f3b2222", "instance 2"), ("0", "card 0"), ("MIG-aabb2", "instance 5"),
     ("MIG-aab", "instance 5")],
)  # fmt: skip
def test_of_a_divided_gpu_the_first_instance_is_taken(visible, expected, torch_version, system, monkeypatch) -> None:
    FakeNvml(monkeypatch, []).divided = True
    torch_version("2.13.0+cu130")
    system([], visible)
    assert find_device().name == f"NVIDIA {expected}"


@pytest.mark.parametrize(("visible", "uuid"), [("0", "GPU-8f2a1111"), ("1", "MIG-aaaa1"), ("MIG-aab", "MIG-aabb2")])
def test_each_gpu_or_instance_has_a_queue_of_its_own(visible, uuid, torch_version, system, monkeypatch) -> None:
    """Processes that share it find each other by this name."""
    FakeNvml(monkeypatch, []).divided = True
    torch_version("2.13.0+cu130")
    system([], visible)
    device = CudaDevice.find()
    assert device is not None
    assert device.identity == uuid


def test_a_gpu_is_used_without_nvml_and_that_is_said(torch_version, system, monkeypatch, caplog) -> None:
    FakeNvml(monkeypatch, [])
    monkeypatch.setattr(pynvml, "nvmlInit", no_library)
    torch_version("2.13.0+cu130")
    system(["/dev/nvidia0"], None)
    device = find_device()
    assert isinstance(device, CudaDevice)
    assert (device.memory(), device.telemetry()) == (Memory(), Telemetry())
    assert "NVML cannot be asked" in caplog.text
    assert "NVIDIA_DRIVER_CAPABILITIES" in caplog.text


def test_without_nvml_torch_tells_the_sizes_once_it_has_a_context(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda index: contexts[index], raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3 * GIB, 8 * GIB))
    contexts = {0: False}
    probe = TorchProbe()
    assert probe.memory() == Memory()
    contexts[0] = True
    assert probe.memory() == Memory(8 * GIB, 3 * GIB)

    def lost(index: int) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    assert probe.memory() == Memory()


@pytest.mark.parametrize(
    ("files", "visible", "nvml", "version", "said"),
    [
        ([], None, False, "2.13.0+cu130", None),
        ([], None, True, "2.13.0+cpu", "build without CUDA"),
        ([], "0", False, "2.13.0+cu130", "NVML cannot be asked"),
        ([], "9", True, "2.13.0+cu130", "no such GPU"),
        (["/dev/nvidia0"], None, False, "2.13.0+cpu", "NVML cannot be asked"),
        (["/dev/nvidia0"], "", False, "2.13.0+cu130", None),
        (["/dev/nvidia0"], "-1", True, "2.13.0+cu130", None),
    ],
)
def test_the_cpu_is_taken_in_silence_only_where_no_gpu_is_or_it_is_hidden(
    files, visible, nvml, version, said, torch_version, system, monkeypatch, caplog
) -> None:
    FakeNvml(monkeypatch, [])
    if not nvml:
        monkeypatch.setattr(pynvml, "nvmlInit", no_library)
    torch_version(version)
    system(files, visible)
    assert isinstance(find_device(), CpuDevice)
    assert (said in caplog.text) if said else not caplog.text


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


def test_processes_that_draw_are_holders_too_and_those_that_do_both_are_listed_once(torch_version, monkeypatch) -> None:
    nvml = FakeNvml(monkeypatch, [Process(11, GIB), Process(12, 2 * GIB)])
    nvml.drawing = [Process(12, 2 * GIB), Process(13, None)]
    torch_version("2.13.0+cu130")
    device = CudaDevice.find()
    assert device is not None
    assert sorted(device.holders()) == [(11, GIB), (12, 2 * GIB), (13, None)]
    nvml.processes = []
    assert device.memory().process_bytes == 0, "a desktop that draws does not make it unknown"


def test_a_driver_that_fails_later_makes_the_numbers_unknown(torch_version, monkeypatch) -> None:
    FakeNvml(monkeypatch, [])
    torch_version("2.13.0+cu130")
    device = CudaDevice.find()

    def lost(handle: str) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lost)
    assert device.memory().free_bytes is None


@pytest.mark.parametrize(
    "error", [pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED), pynvml.NVMLLibraryMismatchError()], ids=repr
)
def test_a_driver_that_lists_no_processes_still_knows_the_memory(error, torch_version, system, monkeypatch) -> None:
    """As in WSL2 and on virtual GPUs, or one that is older than pynvml expects."""
    FakeNvml(monkeypatch, [Process(11, GIB)])
    torch_version("2.13.0+cu130")
    system([], None)
    device = CudaDevice.find()
    assert device is not None

    def unsupported(handle: str) -> None:
        raise error

    monkeypatch.setattr(pynvml, "nvmlDeviceGetGraphicsRunningProcesses", unsupported)
    assert device.holders() == ((11, GIB),)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", unsupported)
    assert device.memory() == Memory(80 * GIB, 70 * GIB, None)
    assert device.holders() == ()


def test_tensors_on_another_gpu_than_the_managed_one_are_refused(torch_version, monkeypatch) -> None:
    FakeNvml(monkeypatch, [])
    torch_version("2.13.0+cu130")
    device = find_device()

    def tensor(where: str) -> Any:
        return types.SimpleNamespace(is_cuda=where != "cpu", device=torch.device(where))

    assert [device.holds_tensor(tensor(where)) for where in ("cpu", "cuda:0")] == [False, True]
    with pytest.raises(OnAnotherDevice, match=r"cuda:1.*CUDA_VISIBLE_DEVICES=0"):
        device.holds_tensor(tensor("cuda:1"))


class TestEnergy:
    """What the card has drawn since it was found."""

    def test_the_cards_counter_is_read_and_a_reloaded_driver_begins_again(self, torch_version, monkeypatch) -> None:
        FakeNvml(monkeypatch, [])
        torch_version("2.13.0+cu130")
        drawn_mj = [5_000_000]
        monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: drawn_mj[0])
        monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda handle: 60_000)
        device = CudaDevice.find()
        assert device is not None
        assert device.telemetry() == Telemetry(0, 60.0, 0.0)
        drawn_mj[0] += 7_200_000  # 2 Wh
        assert device.telemetry().energy_wh == 2
        drawn_mj[0] = 1_000
        assert device.telemetry().energy_wh == 2
        drawn_mj[0] += 3_600_000
        assert device.telemetry().energy_wh == 3

    def test_without_a_counter_the_power_at_each_reading_is_added_up(self) -> None:
        meter = EnergyMeter()
        assert meter.read(0, None, 100) == 0
        assert meter.read(1800, None, 300) == 100
        assert meter.read(3600, None, None) is None
        assert meter.read(7200, None, 300) == 100, "nobody knows what was drawn in between"
        assert meter.read(10_800, None, 300) == 400

    def test_a_counter_that_fails_for_a_moment_loses_nothing(self) -> None:
        meter = EnergyMeter()
        assert meter.read(0, 3600, 1000) == 0
        assert meter.read(3600, None, 1000) == 0
        assert meter.read(7200, 2 * 3600, 1000) == 1

    def test_a_card_that_tells_neither_has_drawn_an_unknown_amount(self) -> None:
        assert EnergyMeter().read(0, None, None) is None


@pytest.mark.parametrize("sign", ["gpu_manager", "from residency.workers.fork_server import main"])
def test_another_app_is_a_peer_and_a_worker_process_of_this_one_is_not(
    sign: str, system, torch_version, monkeypatch
) -> None:
    command = [sys.executable, "-c", "import signal; signal.pause()", sign]
    child = subprocess.Popen(command)
    orphan = int(subprocess.check_output(["sh", "-c", f"{shlex.join(command)} >&2 & echo $!"]))
    try:
        FakeNvml(monkeypatch, [Process(os.getpid(), 1), Process(child.pid, 20), Process(orphan, 300)])
        torch_version("2.13.0+cu130")
        system([], None)
        assert find_device().telemetry().peers_bytes == 300
    finally:
        child.kill()
        child.wait()
        os.kill(orphan, signal.SIGKILL)
