"""Test weights of a given size, identical in every process, and their device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residency.contracts import Device
from residency.devices import CpuDevice, CudaDevice

from ._children import Unavailable
from ._meter import Ledger, Meter

if TYPE_CHECKING:
    import torch

_BLOCK_ELEMENTS = 2 << 20
_SMALL_ELEMENTS = 4 << 10


@dataclass(frozen=True)
class Plan:
    """Options of a run; ``device``: cpu, cuda or simulated; ``many``: number of tensors of 1 KB."""

    size: int
    tensors: int
    many: int
    device: str
    folder: str

    @property
    def snapshots(self) -> Path:
        return Path(self.folder, "snapshots")

    @property
    def model(self) -> Path:
        return Path(self.folder, "model")

    @property
    def pickle(self) -> Path:
        return Path(self.folder, "model.pt")


def make_device(plan: Plan) -> Device:
    if plan.device == "cuda":
        device = CudaDevice.find()
        if device is None:
            raise Unavailable("no CUDA device")
        device.ensure_usable()
        return device
    return Ledger(2 * plan.size + (1 << 30)) if plan.device == "simulated" else CpuDevice()


def start(plan: Plan, separate: bool = False) -> tuple[Device, Meter]:
    """Returns the device and a meter for it, after a warm-up of all code that moves weights."""
    from residency.memory.weights import Weights

    device = make_device(plan)
    if device.separate:
        weights = Weights({"warm-up": filled((1 << 20,), 0, device.torch_device)}, device)
        weights.offload()
        weights.restore()
        weights.release()
    elif separate:
        raise Unavailable("nothing moves: device and host are one memory")
    return device, Meter(device)


def filled(shape: tuple[int, ...], number: int, device: str) -> torch.Tensor:
    """Returns finite, non-repeating bfloat16 values; identical for the same ``number`` in every process."""
    import torch

    target = torch.empty(shape, dtype=torch.bfloat16, device=device)
    fill(target, number, _block(device))
    return target


def fill(target: torch.Tensor, number: int, block: torch.Tensor) -> None:
    import torch

    words = target.detach().reshape(-1).view(torch.int16)
    for index, start in enumerate(range(0, len(words), len(block))):
        part = words[start : start + len(block)]
        torch.add(block[: len(part)], (number * 37 + index) % 101, out=part)


def plain_tensors(plan: Plan, device: str) -> dict[str, torch.Tensor]:
    """Returns the planned number of tensors with the planned total size: a quarter small, the others of equal size."""
    elements = plan.size // 2
    small = plan.tensors // 4 if elements > plan.tensors * _SMALL_ELEMENTS else 0
    large = (elements - small * _SMALL_ELEMENTS) // (plan.tensors - small)
    shapes = [(_SMALL_ELEMENTS,) if index < small else (large,) for index in range(plan.tensors)]
    return _fill_all(((f"t{index}", shape) for index, shape in enumerate(shapes)), device)


def model_tensors(plan: Plan, device: str) -> dict[str, torch.Tensor]:
    """Returns weights for `meta_model`."""
    shapes = ((name, tuple(parameter.shape)) for name, parameter in meta_model(plan).named_parameters())
    return _fill_all(shapes, device)


def meta_model(plan: Plan) -> Any:
    """Returns a language model of about that size, in bfloat16, on the meta device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width = next(
        width for size, width in ((16 << 30, 4096), (2 << 30, 2048), (64 << 20, 1024), (0, 128)) if plan.size >= size
    )
    vocabulary = 8 * width
    layers = max(1, round((plan.size / 2 - 2 * vocabulary * width) / (16 * width * width)))
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).bfloat16()


def nbytes_of(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def check(tensors: dict[str, torch.Tensor], renew: Callable[[int], torch.Tensor], number: int = -1) -> None:
    """Fails if a move has changed the weights, which makes its time meaningless."""
    import torch

    tensor = list(tensors.values())[number]
    if not torch.equal(tensor, renew(number % len(tensors))):
        raise AssertionError("the weights did not come back as they were")


def _block(device: str) -> torch.Tensor:
    import torch

    noise = torch.randn(_BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    return noise.view(torch.int16).to(device)


def _fill_all(shapes: Iterator[tuple[str, tuple[int, ...]]], device: str) -> dict[str, torch.Tensor]:
    import torch

    block = _block(device)
    tensors = {}
    for number, (name, shape) in enumerate(shapes):
        tensors[name] = torch.empty(shape, dtype=torch.bfloat16, device=device)
        fill(tensors[name], number, block)
    return tensors
