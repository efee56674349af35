"""A real card beside other processes: their memory is added to NVML's answers, which this machine's driver gives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest
import torch
from card_use import until
from gpu_memory import MB
from nvml_of_card import Process

from gpu_manager import CudaDevice, GPUResourceManager, RequestTimeout, Sharing, State
from residency.sharing.board import Board

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device that torch can use through CUDA")

SIZE = 64 * MB


class Other:
    """A process that holds memory of the card by NVML alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pid: int) -> None:
        self.pid, self.nbytes = pid, 0
        real = pynvml.nvmlDeviceGetMemoryInfo, pynvml.nvmlDeviceGetComputeRunningProcesses

        def memory(handle: Any) -> Any:
            found = real[0](handle)
            free = max(0, found.free - self.nbytes)
            return pynvml.c_nvmlMemory_t(total=found.total, free=free, used=found.total - free)

        def processes(handle: Any) -> list[Any]:
            return [*real[1](handle), *([Process(self.pid, self.nbytes)] if self.nbytes else [])]

        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", processes)

    def leave(self, device: CudaDevice, nbytes: int) -> None:
        """Takes all but so many bytes."""
        free_bytes = device.memory().free_bytes
        assert free_bytes is not None
        self.nbytes += free_bytes - nbytes


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[Other]:
    """Its process is no child of this one."""
    command = ["sh", "-c", '"$@" >/dev/null & echo $!', "sh", sys.executable, "-c", "import time; time.sleep(600)"]
    pid = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    yield Other(monkeypatch, pid)
    subprocess.run(["kill", str(pid)], check=False)


@pytest.fixture
def manager(device: CudaDevice, tmp_path: Path) -> Iterator[GPUResourceManager]:
    sharing = Sharing(headroom_bytes=32 * MB, folder=tmp_path)
    with GPUResourceManager(device, keep_warm=600, sharing=sharing, isolation="none") as manager:
        manager.register("tts", lambda: torch.nn.Linear(SIZE // 4096, 1024, bias=False, device="cuda"), size_bytes=SIZE)
        yield manager


def weights(manager: GPUResourceManager) -> torch.Tensor:
    with manager.lease("tts") as engine:
        return engine.weight.detach().cpu().clone()


def test_a_model_leaves_for_a_process_that_grows_and_returns_when_there_is_room(
    manager: GPUResourceManager, other: Other, tmp_path: Path
) -> None:
    assert isinstance(manager.device, CudaDevice)
    before = weights(manager)
    board = Board(tmp_path, manager.device.identity)
    until(lambda: any(ticket.marks_presence for ticket in board.tickets()))
    other.leave(manager.device, 8 * MB)
    assert manager.wait_for("tts", State.HOST, 60)
    sharing = manager.status()["sharing"]
    assert sharing is not None
    assert sharing["last_yield"] is not None
    assert (sharing["last_yield"]["pid"], sharing["last_yield"]["bytes"]) == (other.pid, SIZE)
    other.leave(manager.device, 8 * MB)  # also what has left
    with pytest.raises(RequestTimeout) as caught, manager.lease("tts", timeout=1):
        pass
    assert f"({other.pid})" in caught.value.en
    other.nbytes = 0
    assert torch.equal(weights(manager), before)
