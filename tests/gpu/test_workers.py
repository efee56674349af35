"""A model in a worker process on a real card: nothing of it is left there after a release."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
import torch
from worker_engines import LINUX, speak

from gpu_manager import CudaDevice, GPUResourceManager
from residency.errors import WorkerDied

pytestmark = [LINUX, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

COUNT = 1 << 22


class Engine:
    def __init__(self) -> None:
        self.weights = torch.arange(COUNT, dtype=torch.float32).to("cuda")

    def __call__(self) -> float:
        return float(self.weights.cpu()[-1])


@pytest.fixture(scope="module")
def manager() -> Iterator[GPUResourceManager]:
    device = CudaDevice.find()
    assert device is not None
    with GPUResourceManager(device, isolation="process") as manager:
        manager.register("tts", Engine)
        yield manager


def pid(manager: GPUResourceManager) -> int:
    worker = manager.status()["models"]["tts"]["worker"]
    assert worker is not None
    return worker["pid"]


def listed(manager: GPUResourceManager) -> set[int]:
    """The processes that the driver lists; in containers perhaps none, or with the host's numbers."""
    probe = manager.device._probe
    return {found for found, _ in probe.holders()}


def test_weights_survive_and_the_manager_uses_no_cuda(manager: GPUResourceManager) -> None:
    before = listed(manager), manager.device.memory().free_bytes
    allocated = torch.cuda.is_initialized() and torch.cuda.memory_allocated()
    for _ in range(3):
        assert speak(manager) == COUNT - 1
        manager.offload("tts")
        assert manager.status()["models"]["tts"]["device_bytes"] == 0
    assert (torch.cuda.is_initialized() and torch.cuda.memory_allocated()) == allocated
    with manager.lease("tts") as engine:
        assert engine.weights.device.type == "cpu", "a value that is read is a copy in main memory"
    manager.release("tts")
    assert listed(manager) == before[0]
    assert manager.device.memory().free_bytes == before[1]


def test_a_worker_that_is_killed_gives_its_memory_back(manager: GPUResourceManager) -> None:
    before = listed(manager)
    with manager.lease("tts") as engine:
        process = psutil.Process(pid(manager))
        process.kill()
        psutil.wait_procs([process])
        with pytest.raises(WorkerDied):
            engine()
    assert speak(manager) == COUNT - 1
    manager.release("tts")
    assert listed(manager) == before
