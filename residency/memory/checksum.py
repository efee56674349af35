"""Detects changed weights by checksum, on the device that holds them.

Main memory: XXH3. Devices: multilinear hashing with 64-bit weights over 32-bit words, from O. Kaser, D. Lemire:
Strongly universal string hashing is fast. Computer Journal 57(11), 2014. Each position has its own random weight, so
swapped elements change the sum (`torch.hash_tensor`, an xor, ignores the order). Two different contents have the same
sum with a probability of at most 2**-32; each process draws new weights.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING

import xxhash

from .mirror import SPAN_BYTES

if TYPE_CHECKING:
    import torch

_WORD_BYTES = 4


def checksums(raws: Iterable[torch.Tensor], count: int) -> list[int]:
    """Returns a 64-bit checksum for each of ``count`` tensors (uint8 [n], 0 < n <= `SPAN_BYTES`) on one device.

    Comparable only within this process and device. Consumes the tensors one at a time; needs scratch space of 4 spans
    on a GPU, none in main memory.
    """
    raws = iter(raws)
    first = next(raws, None)
    if first is None:
        return []
    raws = itertools.chain([first], raws)
    if first.device.type == "cpu":
        return [host_checksum(raw) for raw in raws]
    return multilinear(raws, count, first.device)


def host_checksum(raw: torch.Tensor) -> int:
    """Returns the XXH3 of a contiguous uint8 tensor in main memory; the same in every process."""
    # Not through numpy: torch does not resize a storage after ``tensor.numpy()``.
    return xxhash.xxh3_64_intdigest(memoryview_of(raw))


def memoryview_of(raw: torch.Tensor) -> memoryview:
    """Returns the bytes of a contiguous uint8 tensor in main memory. Valid while the tensor keeps its storage."""
    return memoryview((ctypes.c_char * len(raw)).from_address(raw.data_ptr())).cast("B")


def multilinear(raws: Iterable[torch.Tensor], count: int, device: torch.device) -> list[int]:
    """Returns the sums, on any device. Synchronizes with the device once, at the end."""
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
    """Returns random 64-bit numbers, drawn once per process; those of a generator depend on a 32-bit seed."""
    import torch

    return torch.frombuffer(bytearray(secrets.token_bytes(8 * count)), dtype=torch.int64)
