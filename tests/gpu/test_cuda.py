"""What only a CUDA device can show. Skipped where torch cannot use one."""

from __future__ import annotations

import pytest
import torch

from gpu_manager import CudaDevice, GPUResourceManager
from residency.memory.weights import Weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device that torch can use through CUDA")


def test_weights_leave_the_gpu_and_return_bit_for_bit(device: CudaDevice) -> None:
    reserved_before = torch.cuda.memory_reserved()
    tensor = torch.randn(64 << 20, device="cuda")
    window, before = tensor[5:50], tensor.cpu()
    weights = Weights({"t": tensor, "window": window}, device)
    assert weights.offload() == 256 << 20
    assert torch.cuda.memory_reserved() == reserved_before
    assert tensor.device.type == "cuda"
    weights.restore()
    assert torch.equal(tensor.cpu(), before)
    assert torch.equal(window.cpu(), before[5:50])
    weights.release()


def test_an_engine_is_on_the_gpu_only_while_it_is_leased(device: CudaDevice) -> None:
    allocated_before = torch.cuda.memory_allocated()
    with GPUResourceManager(device) as manager:
        manager.register("m", lambda: torch.nn.Linear(2048, 2048, device="cuda"))
        x = torch.ones(1, 2048, device="cuda")
        with manager.lease("m") as engine:
            before = engine(x)
        assert torch.cuda.memory_allocated() - allocated_before < 1 << 20
        with manager.lease("m") as engine:
            assert torch.equal(engine(x), before)
    assert torch.cuda.memory_allocated() - allocated_before < 1 << 20


def test_looking_at_the_device_creates_no_context(device: CudaDevice) -> None:
    memory = device.memory()
    assert memory.total_bytes
    assert memory.free_bytes is not None
