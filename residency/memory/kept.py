"""Weights that outlive their worker process: the mirror of an engine in shared memory, which the manager owns too.

After an offload, the worker sends the descriptor of the memory and an index to the manager. If the worker ends, both go
to the next one, whose loader takes the weights by `kept_weights` and need not read its files.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from ..shared_file import SharedFile
from .checksum import host_checksum
from .mirror import MirrorLayout
from .weights import Weights

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptTensor:
    """A tensor over storage number ``storage``; -1: without elements. ``offset`` and ``strides`` are in elements."""

    storage: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class KeptWeights:
    """A complete mirror. ``checksums``: XXH3 of each span of the ``layout``.

    ``storages``: size in bytes of each storage, and the element that it repeats if it is not in the mirror.
    ``tensors``: by part of the engine, and by name in the part's ``state_dict()``.
    """

    file: SharedFile
    layout: MirrorLayout
    checksums: tuple[int, ...]
    storages: tuple[tuple[int, bytes | None], ...]
    tensors: Mapping[str, Mapping[str, KeptTensor]]

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes


class _Offer:
    """What the loader that runs can take, and the parts for which it has asked."""

    def __init__(self, weights: KeptWeights | None) -> None:
        self.parts: list[str] = []
        self._weights = weights

    def take(self, part: str) -> dict[str, torch.Tensor] | None:
        self.parts.append(part)
        named = self._weights.tensors.get(part) if self._weights else None
        if named is None:
            return None
        try:
            storage = self._storages
        except OSError as error:
            logger.warning("The weights that an earlier worker process left are not used: %s", error)
            self._weights = None
            return None
        return {name: _tensor(storage, kept) for name, kept in named.items()}

    @functools.cached_property
    def _storages(self) -> Callable[[int], torch.Tensor]:
        """Returns the bytes of a storage by its number, the same tensor each time. Raises OSError if any is damaged."""
        import torch

        assert self._weights is not None
        weights, mapping = self._weights, self._weights.file.mapped(shared=False)
        raw = torch.frombuffer(mapping, dtype=torch.uint8)
        places: dict[int, list[tuple[int, int]]] = {}
        for span, checksum in zip(weights.layout.spans, weights.checksums, strict=True):
            if host_checksum(raw[span.start : span.stop]) != checksum:
                raise OSError(f"they are damaged at byte {span.start:,}")
            start = span.start
            for part in span.parts:
                places.setdefault(part.index, []).append((start, start + part.stop - part.start))
                start += part.stop - part.start

        @functools.cache
        def storage(number: int) -> torch.Tensor:
            nbytes, constant = weights.storages[number]
            if constant is not None:
                return torch.frombuffer(bytearray(constant * (nbytes // len(constant))), dtype=torch.uint8)
            (start, stop), *more = places[number]
            if stop - start == nbytes and not start % _ALIGNED:
                return torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes, offset=start)
            return torch.cat([raw[start:stop], *(raw[start:stop] for start, stop in more)])

        return storage


_ALIGNED = 16
_offer: _Offer | None = None


def kept_weights(part: str) -> dict[str, torch.Tensor] | None:
    """Returns the weights that a loader need not read from its files; call it in the loader, for each part.

    After its worker process has died, or was ended, while the model was offloaded, the weights of its last offload are
    still in main memory. ``part`` is the path of a module in the engine that the loader will return (``"model"``,
    ``"tts.llm"``; ``""``: the engine itself). Returns what ``state_dict()`` of that module returned: tensors in main
    memory by name, of the same dtypes and shapes; changing them has no effect on others. None at other loads, and
    without process isolation: then read the files.

    Only models whose loader calls this keep their weights so. Any thread may call it during the load.
    """
    return None if _offer is None else _offer.take(part)


@contextlib.contextmanager
def offered(weights: KeptWeights | None) -> Iterator[list[str]]:
    """Lets the loader within the context take these weights; yields the parts for which it asks. One at a time."""
    global _offer
    offer = _offer = _Offer(weights)
    try:
        yield offer.parts
    finally:
        _offer = None


def named_tensors(engine: Any, parts: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the tensors of these parts, which are on the device, by name. Raises AttributeError without such a part.

    A part with other things than tensors in its ``state_dict()`` raises TypeError.
    """
    import torch

    found: dict[str, dict[str, torch.Tensor]] = {}
    for part in parts:
        module = attrgetter(part)(engine) if part else engine
        found[part] = dict(module.state_dict(keep_vars=True))
        if strange := [name for name, thing in found[part].items() if not isinstance(thing, torch.Tensor)]:
            raise TypeError(f"{part}.{strange[0]} is no tensor")
    return found


def index_of(weights: Weights, named: Mapping[str, Mapping[str, torch.Tensor]]) -> KeptWeights | None:
    """Returns the index of an offloaded mirror in shared memory; None if it is not there, or lacks a tensor."""
    import torch

    mirror = weights.mirror
    if mirror.memory.file is None:
        return None
    numbers = {
        id(tensor): number
        for number, managed in enumerate(weights.storages)
        for tensor in managed.tensors.values()
    }  # fmt: skip
    with torch._C.DisableTorchFunctionSubclass():
        tensors = {
            part: {name: _placed(tensor, numbers.get(id(tensor), -1)) for name, tensor in things.items()}
            for part, things in named.items()
            if all(id(tensor) in numbers or not tensor.numel() for tensor in things.values())
        }
    if not tensors:
        return None
    storages = tuple((managed.nbytes, managed.constant) for managed in weights.storages)
    return KeptWeights(mirror.memory.file, mirror.layout, tuple(mirror.host_checksums()), storages, tensors)


def _placed(tensor: torch.Tensor, storage: int) -> KeptTensor:
    return KeptTensor(storage, int(tensor.storage_offset()), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


def _tensor(storage: Callable[[int], torch.Tensor], kept: KeptTensor) -> torch.Tensor:
    import torch

    if kept.storage < 0:
        return torch.empty(kept.shape, dtype=kept.dtype)
    raw = storage(kept.storage)
    whole = raw[: len(raw) // kept.dtype.itemsize * kept.dtype.itemsize].view(kept.dtype)
    return whole.as_strided(kept.shape, kept.strides, kept.offset)
