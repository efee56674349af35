"""For tests with CUDA: weights that are released at the test's end, and a card with little free memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping

import torch

from gpu_manager import CudaDevice
from residency.memory.weights import Weights

MB = 1 << 20

Leave = Callable[[int | None], None]
"""Limits torch to this many bytes beyond its current use; None: no limit."""


class Make:
    """Creates `Weights`, and releases them later."""

    def __init__(self, device: CudaDevice) -> None:
        self.device = device
        self._made: list[Weights] = []

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> Weights:
        self._made.append(Weights(tensors, self.device))
        return self._made[-1]

    def of_sizes(self, *sizes: int) -> tuple[Weights, dict[str, torch.Tensor], list[torch.Tensor]]:
        """Returns weights of random bytes, their tensors by name (uint8 [size]), and copies of these on the CPU."""
        tensors = {str(number): random_bytes(size) for number, size in enumerate(sizes)}
        return self(tensors), tensors, [tensor.cpu() for tensor in tensors.values()]

    def release(self) -> None:
        while self._made:
            self._made.pop().release()


def random_bytes(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda")


def all_equal(tensors: Mapping[str, torch.Tensor], copies: list[torch.Tensor]) -> bool:
    return all(torch.equal(tensor.cpu(), copy) for tensor, copy in zip(tensors.values(), copies, strict=True))


def leave(nbytes: int | None) -> None:
    """See `Leave`."""
    if nbytes is None:
        torch.cuda.set_per_process_memory_fraction(1.0)
        return
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + nbytes) / total)
