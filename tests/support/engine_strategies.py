"""Random engines and lives: hypothesis strategies, and functions to build, edit and compare them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from hypothesis import strategies as st

from residency.memory import checksum, weights_mirror
from residency.memory.discovery import discover
from residency.memory.mirror import lay_out

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip
OWNERS = ["torch", "torch", "inference", "numpy", "mmap"]
VIEWS = ["same", "detached", "slice", "strided", "transposed", "expanded", "scalar", "empty", "reinterpreted", "conj"]
HOMES = ["parameter", "buffer", "cache", "attribute", "list", "dict", "shared"]
EDITS = ["add_", "data.add_", "swap", "bit", "nan", "fill"]
LARGE_BYTES = (1 << 20) + 32  # from this size on, constant storages are stored as their value


@dataclass(frozen=True)
class View:
    kind: str
    home: str
    start: int
    step: int
    requires_grad: bool


@dataclass(frozen=True)
class Base:
    """One storage and the tensors over it; ``content`` is repeated to ``nbytes``, with one byte changed."""

    dtype: torch.dtype
    owner: str
    nbytes: int
    content: bytes
    odd_byte: int | None
    views: tuple[View, ...]


@dataclass(frozen=True)
class Step:
    """A move or an edit; the two numbers select the edited object and position, or the free memory."""

    what: str
    which: int
    where: int


@st.composite
def bases(draw: st.DrawFn) -> Base:
    dtype = draw(st.sampled_from(DTYPES))
    itemsize = torch.empty((), dtype=dtype).element_size()
    pattern = st.binary(min_size=itemsize, max_size=itemsize)
    if draw(st.integers(0, 9)) == 9:
        nbytes, content = LARGE_BYTES, draw(pattern)
        odd_byte = draw(st.none() | st.integers(0, nbytes - 1))
    else:
        nbytes = draw(st.integers(0, 40)) * itemsize
        content = draw(pattern | st.binary(min_size=itemsize, max_size=64))
        odd_byte = None
    if dtype is torch.bool:  # bytes other than 0 and 1 are undefined behaviour
        content, odd_byte = bytes(byte & 1 for byte in content), None
    views = st.builds(
        View, st.sampled_from(VIEWS), st.sampled_from(HOMES), st.integers(0, 9), st.integers(1, 3), st.booleans()
    )
    owner = draw(st.sampled_from(OWNERS))
    return Base(dtype, owner, nbytes, content, odd_byte, tuple(draw(st.lists(views, min_size=1, max_size=4))))


def engines() -> st.SearchStrategy[tuple[Base, ...]]:
    return st.lists(bases(), min_size=1, max_size=5).map(tuple)


def lives(moves: list[str]) -> st.SearchStrategy[list[Step]]:
    kinds = st.sampled_from([*moves, *EDITS])
    return st.lists(st.builds(Step, kinds, st.integers(0, 99), st.integers(0, 1 << 21)), min_size=1, max_size=12)


@contextmanager
def small_layout(span_bytes: int, group_bytes: int, multilinear: bool = False) -> Iterator[None]:
    """Makes spans and groups of mirrors small; ``multilinear``: compares as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_mirror, "lay_out", partial(lay_out, span_bytes=span_bytes, group_bytes=group_bytes))
        if multilinear:
            patch.setattr(checksum, "SPAN_BYTES", span_bytes)
            on_cpu = torch.device("cpu")
            patch.setattr(weights_mirror, "checksums", lambda raws, n: checksum.multilinear(raws, n, on_cpu))
        yield


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Returns all bytes of a tensor's storage. Not through numpy, after which torch does not resize it."""
    storage = tensor.untyped_storage()
    return ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""


def raw_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor's whole storage as uint8, for writing."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loose: list[torch.Tensor] = []
        self.table: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@dataclass
class Graph:
    """A drawn engine, its tensors, and their invariant properties."""

    drawn: tuple[Base, ...]
    engine: torch.nn.Module = field(init=False)
    hooked: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.engine = torch.nn.Sequential(Block(), torch.nn.ModuleDict({"inner": Block()}))
        blocks: list[Block] = [self.engine[0], self.engine[1]["inner"]]
        for number, base in enumerate(self.drawn):
            first = _tensor(base)
            for index, view in enumerate(base.views):
                with torch.inference_mode(first.is_inference()):
                    tensor = _view(first, view)
                self._put(blocks, blocks[(number + index) % 2], f"t{number}_{index}", tensor, view)
        self._hook = self.engine.register_forward_hook(lambda *_: self.hooked.append("forward"))
        self.tensors = discover(self.engine).tensors
        self.facts = self._facts()

    def _put(self, blocks: list[Block], block: Block, name: str, tensor: torch.Tensor, view: View) -> None:
        differentiable = tensor.is_floating_point() or tensor.is_complex()
        if view.home == "parameter" and not tensor.is_inference() and not tensor.is_conj() and not tensor.is_neg():
            parameter = torch.nn.Parameter(tensor.detach(), requires_grad=differentiable and view.requires_grad)
            if parameter.requires_grad:
                parameter.register_hook(lambda grad: self.hooked.append("backward"))
            block.register_parameter(name, parameter)
        elif view.home in ("buffer", "cache"):
            block.register_buffer(name, tensor, persistent=view.home == "buffer")
        elif view.home == "shared":
            for owner in blocks:
                owner.register_buffer(name, tensor)
        elif view.home == "list":
            block.loose.append(tensor)
        elif view.home == "dict":
            block.table[name] = tensor
        else:
            setattr(block, name, tensor)

    def contents(self) -> dict[str, bytes]:
        return {path: bytes_of(tensor) for path, tensor in self.tensors.items()}

    def write(self, contents: dict[str, bytes]) -> None:
        with torch.inference_mode():
            for path, tensor in self.tensors.items():
                if contents[path]:
                    raw_of(tensor).copy_(torch.frombuffer(bytearray(contents[path]), dtype=torch.uint8))

    def check_unchanged(self) -> None:
        """Checks identity, type, shape, strides, gradients, hooks and ties against those at the start."""
        found = discover(self.engine).tensors
        assert found.keys() == self.tensors.keys()
        assert all(found[path] is tensor for path, tensor in self.tensors.items())
        assert self._facts() == self.facts
        self.hooked.clear()
        self.engine.register_forward_hook  # noqa: B018 - the module still is one
        assert self._hook.id in self.engine._forward_hooks
        for tensor in self.tensors.values():
            if tensor.requires_grad and tensor.dtype is torch.float32 and tensor.numel():
                tensor.sum().backward()
                tensor.grad = None
                assert self.hooked == ["backward"]
                break

    def _facts(self) -> dict[str, tuple[object, ...]]:
        storages: dict[int, int] = {}
        return {
            path: (
                id(tensor), type(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(),
                tensor.requires_grad, tensor.is_inference(), tensor.is_conj(), tensor.is_neg(), str(tensor.device),
                len(tensor._backward_hooks or ()),
                storages.setdefault(tensor.untyped_storage()._cdata, len(storages)),
            )
            for path, tensor in self.tensors.items()
        }  # fmt: skip

    def edit(self, step: Step) -> None:
        """Changes something in place, like an engine, possibly without a change of torch's version counter."""
        tensors = [tensor for tensor in self.tensors.values() if tensor.untyped_storage().nbytes()]
        if not tensors:
            return
        tensor = tensors[step.which % len(tensors)]
        with torch.inference_mode():
            if step.what in ("add_", "data.add_") and _can_add(tensor):
                (tensor if step.what == "add_" else tensor.data).add_(1)
                return
            self._edit_bytes(step, tensor)

    @staticmethod
    def _edit_bytes(step: Step, tensor: torch.Tensor) -> None:
        raw = raw_of(tensor)
        size = tensor.element_size()
        elements = raw[: len(raw) // size * size].view(-1, size)
        here, there = step.where % len(elements), (step.where * 7 + 1) % len(elements)
        of_bools = tensor.dtype is torch.bool
        if step.what == "swap":
            first = elements[here].clone()
            elements[here] = elements[there]
            elements[there] = first
        elif step.what == "fill":
            elements[:] = elements[here].clone()
        elif step.what == "nan" and not of_bools:  # mostly a NaN with a payload, in every format
            elements[here] = 255
            elements[here, 0] = 255 - step.where % 128 if size > 1 else 255
        else:
            raw[step.where % len(raw)] ^= 1 if of_bools else 1 << step.which % 8


def _tensor(base: Base) -> torch.Tensor:
    content = bytearray((base.content * (base.nbytes // len(base.content) + 1))[: base.nbytes])
    if base.odd_byte is not None:
        content[base.odd_byte] ^= 1
    if not content:
        return torch.empty(0, dtype=base.dtype)
    if base.owner == "numpy":
        raw = torch.from_numpy(torch.frombuffer(content, dtype=torch.uint8).numpy().copy())
    elif base.owner == "mmap":
        mapping = mmap.mmap(-1, len(content))
        mapping[:] = bytes(content)
        raw = torch.frombuffer(mapping, dtype=torch.uint8)
    else:
        with torch.inference_mode(base.owner == "inference"):
            raw = torch.frombuffer(content, dtype=torch.uint8).clone()
    with torch.inference_mode(raw.is_inference()):
        return raw.view(base.dtype)


def _view(tensor: torch.Tensor, view: View) -> torch.Tensor:
    start, length = min(view.start, tensor.numel()), tensor.numel()
    if view.kind == "detached":
        return tensor.detach()
    if view.kind == "slice":
        return tensor[start:]
    if view.kind == "strided":
        return tensor[start :: view.step]
    if view.kind == "transposed" and length % 2 == 0:
        return tensor.view(2, length // 2).t()
    if view.kind == "expanded" and length:
        return tensor[:1].expand(3, 1)
    if view.kind == "scalar" and start < length:
        return tensor[start]
    if view.kind == "empty":
        return tensor[:0]
    if view.kind == "reinterpreted" and tensor.dtype is not torch.bool:
        return tensor.view(torch.uint8)
    if view.kind == "conj" and tensor.is_complex():
        return tensor.conj() if view.step == 1 else tensor.conj().imag
    return tensor


def _can_add(tensor: torch.Tensor) -> bool:
    special = (torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
    return tensor.dtype not in special and 0 not in tensor.stride() and tensor.numel() > 0
