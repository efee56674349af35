"""Offloads need no free memory on a full device; restores to a nearly full one need only the size of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engine_strategies import small_layout
from torch.overrides import TorchFunctionMode

from gpu_manager import SimulatedDevice
from residency.memory import weights_mirror as module
from residency.memory.weights import Weights

FULL = "CUDA out of memory. Tried to allocate 2.00 MiB"


class NoRoom(TorchFunctionMode):
    """Fails comparisons, concatenations and transfers, as on a full card, except those of copies on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.on_host: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cpu:
            self.on_host.append(func(*args).clone())
            return self.on_host[-1]
        if func in (torch.Tensor.eq, torch.cat, torch.Tensor.to) and not any(args[0] is one for one in self.on_host):
            raise torch.OutOfMemoryError(FULL)
        return func(*args, **(kwargs or {}))


@contextmanager
def full_card() -> Iterator[None]:
    def no_room(*_: object) -> list[int]:
        raise torch.OutOfMemoryError(FULL)

    with pytest.MonkeyPatch.context() as patch, NoRoom():
        patch.setattr(module, "checksums", no_room)
        yield


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    small = {str(size): torch.randint(0, 256, (size,), dtype=torch.uint8) for size in range(1, 60)}
    return {**small, "large": torch.randn(5000), "zeros": torch.zeros(1 << 19)}


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("changed", [None, "30", "large", "zeros"])
def test_weights_leave_and_return_bit_for_bit(
    changed: str | None, tensors: dict[str, torch.Tensor], device: SimulatedDevice
) -> None:
    with small_layout(512, 5000):
        weights = Weights(tensors, device)
        for _ in range(2):
            before = copies(tensors)
            with full_card():
                weights.offload()
                assert device.ledger_bytes == 0
                weights.restore()
            assert same(tensors, before)
            if changed is not None:
                tensors[changed][0] += 1


def test_a_constant_is_found_without_room_as_well(tensors: dict[str, torch.Tensor], device: SimulatedDevice) -> None:
    weights = Weights(tensors, device)
    with full_card():
        weights.offload()
    assert weights.host_bytes == sum(tensor.nbytes for name, tensor in tensors.items() if name != "zeros")


def test_what_was_copied_without_being_compared_is_compared_again_when_there_is_room(
    tensors: dict[str, torch.Tensor], device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    to_host = module.SpanCopier.to_host

    def noted(self: Any, span: Any, *arguments: Any, **keywords: Any) -> None:
        copied.append(span.nbytes)
        to_host(self, span, *arguments, **keywords)

    monkeypatch.setattr(module.SpanCopier, "to_host", noted)
    with small_layout(512, 5000):
        weights = Weights(tensors, device)
        with full_card():
            weights.offload()
        for expected in (sum(tensor.nbytes for name, tensor in tensors.items() if name != "zeros"), 0):
            weights.restore()
            copied.clear()
            weights.offload()
            assert sum(copied) == expected


def test_an_error_that_is_not_about_room_is_not_taken_for_it(
    tensors: dict[str, torch.Tensor], device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> list[int]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    weights, before = Weights(tensors, device), copies(tensors)
    monkeypatch.setattr(module, "checksums", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        weights.offload()
    assert weights.on_device
    assert same(tensors, before)
