"""A card that is as empty after each test as before it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from gpu_memory import Leave, Make, leave

from gpu_manager import CudaDevice


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    device = CudaDevice.find()
    assert device is not None
    torch.empty(1, device="cuda")  # the context, and what it takes, are there before anything is measured
    gc.collect()
    device.settle()
    yield device
    gc.collect()
    device.settle()


@pytest.fixture
def make(device: CudaDevice) -> Iterator[Make]:
    make = Make(device)
    yield make
    make.release()


@pytest.fixture(name="leave")
def leave_fixture(device: CudaDevice) -> Iterator[Leave]:
    yield leave
    leave(None)
