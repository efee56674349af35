"""A model in a worker process on a real card: nothing of it is left there after a release."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


SCRIPT = """
import json, os, psutil
from gpu_manager import CudaDevice, GPUResourceManager
from test_workers import Engine, listed
family = {os.getpid()}
def ours():
    family.update(each.pid for each in psutil.Process().children(recursive=True))
    return sorted(listed(manager) & family)
with GPUResourceManager(CudaDevice.find(), isolation="process", keep_warm=-1) as manager:
    manager.register("tts", Engine)
    with manager.lease("tts"):
        loaded, worker = ours(), manager.status()["models"]["tts"]["worker"]["pid"]
    manager.release("tts")
    print(json.dumps([loaded, worker, ours()]))
"""


def test_after_a_release_the_driver_lists_no_process_of_ours() -> None:
    """In a process of its own: this one may have used CUDA."""
    folder = Path(__file__).resolve().parent
    path = os.pathsep.join(
        [str(folder.parents[1]), str(folder), str(folder.parent / "support"), *filter(None, sys.path)]
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded, worker, released = json.loads(done.stdout)
    if not loaded:
        pytest.skip("the driver lists no processes, or with the host's numbers")
    assert loaded == [worker], "the worker alone uses CUDA"
    assert released == []
