"""Whether bytes still are what they were, computed where they lie.

In main memory: XXH3. On a device: multilinear hashing with 64-bit weights over 32-bit words, from O. Kaser, D. Lemire:
Strongly universal string hashing is fast. Computer Journal 57(11), 2014. Each position has a random weight of its
own, so that swapped elements show (`torch.hash_tensor` is an xor, blind to order); two different contents have the
same sum with a probability of at most 2**-32, and the weights are drawn anew in each process.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING

import xxhash

from .mirror_layout import SPAN_BYTES

if TYPE_CHECKING:
    import torch

_WORD_BYTES = 4


def fingerprints(raws: Iterable[torch.Tensor], count: int) -> list[int]:
    """A 64-bit number for each of ``count`` tensors of bytes (uint8 [n], 0 < n <= `SPAN_BYTES`) on one device.

    Only comparable within this process and on the same device. Takes one at a time; needs scratch space of 4 spans
    on a GPU, none in main memory.
    """
    raws = iter(raws)
    first = next(raws, None)
    if first is None:
        return []
    raws = itertools.chain([first], raws)
    if first.device.type == "cpu":
        return [hash_of(raw) for raw in raws]
    return multilinear(raws, count, first.device)


def hash_of(raw: torch.Tensor) -> int:
    """XXH3 of a contiguous uint8 tensor in main memory; equal in every process."""
    # Not through numpy: torch refuses to resize a storage that numpy has seen.
    return xxhash.xxh3_64_intdigest(memoryview_of(raw))


def memoryview_of(raw: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor in main memory. Valid as long as the tensor keeps its storage."""
    return memoryview((ctypes.c_char * len(raw)).from_address(raw.data_ptr())).cast("B")


def multilinear(raws: Iterable[torch.Tensor], count: int, device: torch.device) -> list[int]:
    """The sums, on any device. Waits for the device once, at the end."""
    import torch

    weights = _weights(SPAN_BYTES // _WORD_BYTES + 1).to(device)
    products = torch.empty(len(weights), dtype=torch.int64, device=device)
    sums = torch.zeros(count, dtype=torch.int64, device=device)
    for index, raw in enumerate(raws):
        whole, rest = divmod(len(raw), _WORD_BYTES)
        if whole:
            torch.mul(raw[: whole * _WORD_BYTES].view(torch.int32), weights[:whole], out=products[:whole])
            torch.sum(products[:whole], dim=0, out=sums[index])
        if rest:
            last = torch.zeros(_WORD_BYTES, dtype=torch.uint8, device=device)
            last[:rest] = raw[whole * _WORD_BYTES :]
            sums[index] += (last.view(torch.int32) * weights[whole : whole + 1])[0]
    totals: list[int] = sums.tolist()
    return totals


@functools.cache
def _weights(count: int) -> torch.Tensor:
    """Random 64-bit numbers, drawn once in each process; a generator's would depend on a seed of 32 bits."""
    import torch

    return torch.frombuffer(bytearray(secrets.token_bytes(8 * count)), dtype=torch.int64)
