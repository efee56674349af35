"""Finds holders of an engine's tensors outside of it: caches of the process, and views that were kept from a lease."""

from __future__ import annotations

import bisect
import functools
import gc
import itertools
import logging
import sys
import weakref
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from .storages import ARRAYS, RAW, ManagedStorage, forget_guests, is_alone, storage_key

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def held_elsewhere(tensors: list[torch.Tensor], references: Mapping[int, int]) -> frozenset[int]:
    """Those (``id``) that are referred to from outside of the engine.

    Args:
        tensors: all that were found, each object once. The caller has no other reference to any of them.
        references: how many references to each (by ``id``) were found in the engine.
    """
    [ours] = reference_counts([object()])
    counts = zip(tensors, reference_counts(tensors), strict=True)
    # However often C++ refers to a tensor, as the base of views or for a backward pass: that is one reference.
    return frozenset(
        id(tensor) for tensor, count in counts if count > ours + references.get(id(tensor), 0) + (not is_alone(tensor))
    )


def are_held(pieces: Iterable[ManagedStorage], tensors: AbstractSet[int]) -> list[ManagedStorage]:
    """Those that others hold: of which one of ``tensors`` (``id``) is a part, or over which others have a tensor."""
    pieces = list(pieces)
    _find_views(piece for piece in pieces if piece.storage.resizable() and piece.count_strangers() > 0)
    held = []
    for piece in pieces:
        if not tensors.isdisjoint(map(id, piece.tensors.values())) or _have_holders(piece.guests):
            held.append(piece)
        piece.forget_guests()
    return held


def _have_holders(guests: list[torch.Tensor]) -> bool:
    return bool(held_elsewhere(guests, dict.fromkeys(map(id, guests), 0)))


def reference_counts(things: Iterable[Any]) -> list[int]:
    """How often each is referred to, with the same own references for all of them: compare with a new object's."""
    return [sys.getrefcount(thing) for thing in things]


def part_from_strangers(pieces: Collection[ManagedStorage]) -> list[ManagedStorage]:
    """See that nobody else needs the bytes of these when they go; returns those that cannot leave.

    Other tensors of the process over them leave with them (`ManagedStorage.guests`). Native users keep the old storage, and the
    engine gets one of its own; where there is no room for that, the piece stays.
    """
    crowded = [piece for piece in forget_guests(pieces) if not piece.stays and piece.count_strangers() > 0]
    # A numpy array that shares a storage keeps a tensor over it, so that storage must not move.
    _find_views(piece for piece in crowded if piece.storage.resizable())
    # Views that only C++ refers to (autograd keeps some for a backward pass) meet the guard of the storage.
    strangers = {piece for piece in crowded if piece.is_exported()}
    immovable = []
    for piece in pieces:
        if piece.stays or piece.make_resizable(apart=piece in strangers):
            continue
        if piece in strangers:
            piece.stays = True
        else:
            immovable.append(piece)
    for piece in strangers:
        logger.warning(
            "%s: something outside of Python (DLPack?) uses its %s bytes, which stay as long as it does",
            piece.path,
            f"{piece.nbytes:,}",
        )
    return immovable


def note_arrays(tensors: Iterable[torch.Tensor], arrays: Collection[Any]) -> None:
    """Have each storage know (`ARRAYS`) which of these arrays of numpy use its address.

    ``np.from_dlpack`` leaves the storage as it is, and refers to the tensor in C++ as a TorchScript module or autograd
    does; but those follow the tensor to other bytes, and an array does not.
    """
    if not arrays:
        return
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        if storage_key(tensor) is not None and (storage := tensor.untyped_storage()).resizable():
            storages[storage.data_ptr()] = storage
    starts = sorted(storages)
    users: dict[int, list[weakref.ref[Any]]] = {}
    for array in arrays:
        address = array.__array_interface__["data"][0]
        place = bisect.bisect_right(starts, address)
        if place and address < (start := starts[place - 1]) + storages[start].nbytes():
            users.setdefault(start, []).append(weakref.ref(array))
    for start, known in users.items():
        setattr(storages[start], ARRAYS, known)


def _all_tensors() -> list[torch.Tensor]:
    """Every tensor object of the process.

    One call in C, during which no other thread runs: Python refuses to finish a tuple that another thread is building
    if something else refers to it, as a list of all objects does.
    """
    import torch

    everything = itertools.chain.from_iterable(map(gc.get_objects, (None,)))
    return list(filter(functools.partial(type.__instancecheck__, torch._C.TensorBase), everything))


def _find_views(pieces: Iterable[ManagedStorage]) -> None:
    """Add every tensor object of the process over the storages of these to their guests. Looks at all objects."""
    import torch

    wanted = {piece.key: piece for piece in pieces}
    if not wanted:
        return
    known = {id(tensor) for piece in wanted.values() for tensor in (piece.raw, *piece.tensors.values(), *piece.guests)}
    for thing in _all_tensors():
        if id(thing) not in known and RAW not in vars(thing):
            try:
                with torch._C.DisableTorchFunctionSubclass():
                    piece = wanted.get(torch.Tensor.untyped_storage(thing)._cdata)
            except Exception:  # it has no storage
                continue
            if piece is not None:
                piece.guests.append(thing)
