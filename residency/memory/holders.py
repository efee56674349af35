"""Finds references to an engine's tensors from outside it, and storages that another engine owns.

Such holders are caches of the process, views kept from a lease, and containers shared with other code (a module's
dictionary, the tuple kept by an `lru_cache`), which refer to no tensor directly, but use them after the release.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import functools
import gc
import itertools
import logging
import sys
import threading
import types
import weakref
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from ..errors import SharedWeights
from ..locks import renewed_in_children
from . import absent_tensors
from .object_graph import ObjectKind, children, kind_of
from .storages import ARRAYS, BYTE_VIEW, ManagedStorage, forget_other_tensors, is_alone, storage_key

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque, types.MappingProxyType)
_CACHE = type(functools.lru_cache(id))
#: Objects per batch; other threads run between batches.
_BATCH = 2048

#: All `Weights`. Each storage belongs to the ``storages`` of one at most.
_owners: weakref.WeakSet[Any] = weakref.WeakSet()
#: Held while an owner claims storages, so that no other claims the same.
owners_lock = renewed_in_children(threading.Lock())


def held_elsewhere(tensors: list[torch.Tensor], references: Mapping[int, int]) -> frozenset[int]:
    """Returns the tensors (``id``) with references from outside the engine.

    Args:
        tensors: all tensors that were found, each once. The caller has no other reference to any of them.
        references: number of references to each (by ``id``) found in the engine.
    """
    [ours] = reference_counts([object()])
    counts = zip(tensors, reference_counts(tensors), strict=True)
    # All references from C++ (as the base of views, for a backward pass) count as one here.
    return frozenset(
        id(tensor) for tensor, count in counts if count > ours + references.get(id(tensor), 0) + (not is_alone(tensor))
    )


def are_held(storages: Iterable[ManagedStorage], tensors: AbstractSet[int]) -> list[ManagedStorage]:
    """Returns the storages held outside the engine: by a tensor in ``tensors`` (``id``), or by an outside one."""
    storages = list(storages)
    _find_views(managed for managed in storages if managed.storage.resizable() and managed.count_unknown_holders() > 0)
    held = []
    for managed in storages:
        if not tensors.isdisjoint(map(id, managed.tensors.values())) or held_elsewhere(managed.other_tensors, {}):
            held.append(managed)
        managed.forget_other_tensors()
    return held


def mark_held(storages: Iterable[ManagedStorage], tensors: AbstractSet[int]) -> list[ManagedStorage]:
    """Marks and returns the storages of `are_held`; logs each at its first time.

    They move like the others, but return one by one when they are used, and survive a release.
    """
    held = are_held(storages, tensors)
    for managed in held:
        managed.held_elsewhere = True
        if not hasattr(managed.storage, absent_tensors.NAMED):
            setattr(managed.storage, absent_tensors.NAMED, True)
            logger.info(
                "%s: its %s bytes are also referenced outside the engine, and survive its release",
                managed.path,
                f"{managed.nbytes:,}",
            )
    return held


def reference_counts(things: Iterable[Any]) -> list[int]:
    """Returns the reference counts, each with the same overhead: compare with the count of a new object."""
    return [sys.getrefcount(thing) for thing in things]


def detach_from_foreign_code(storages: Collection[ManagedStorage]) -> list[ManagedStorage]:
    """Separates storages from users outside the engine before their bytes go; returns those that cannot be moved.

    Other Python tensors over a storage move with it (`ManagedStorage.other_tensors`). Native users keep the old
    storage, and the engine gets a copy; without room for a copy, the storage stays on the device.
    """
    crowded = [
        managed
        for managed in forget_other_tensors(storages)
        if not managed.stays_on_device and managed.count_unknown_holders() > 0
    ]
    # Resizable ones only: a numpy array keeps a tensor over its storage, and that tensor must keep this storage.
    _find_views(managed for managed in crowded if managed.storage.resizable())
    # Not for views held only by C++ (autograd keeps some for a backward pass): the guard of the storage covers them.
    exported = {managed for managed in crowded if managed.is_exported()}
    immovable = []
    for managed in storages:
        if managed.stays_on_device or managed.make_resizable(apart=managed in exported):
            continue
        if managed in exported:
            managed.stays_on_device = True
        else:
            immovable.append(managed)
    for managed in exported:
        logger.warning(
            "%s: code outside Python (DLPack?) uses its %s bytes, which are kept until that use ends",
            managed.path,
            f"{managed.nbytes:,}",
        )
    return immovable


def note_arrays(tensors: Iterable[torch.Tensor], arrays: Collection[Any]) -> None:
    """Records in each storage (`ARRAYS`) which of these numpy arrays use its address.

    ``np.from_dlpack`` does not change the storage. In C++ it refers to the tensor as a TorchScript module or autograd
    does; but those follow the tensor to other bytes, and an array does not.
    """
    if not arrays:
        return
    by_address: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        if storage_key(tensor) is not None and (storage := tensor.untyped_storage()).resizable():
            by_address[storage.data_ptr()] = storage
    starts = sorted(by_address)
    users: dict[int, list[weakref.ref[Any]]] = {}
    for array in arrays:
        address = array.__array_interface__["data"][0]
        place = bisect.bisect_right(starts, address)
        if place and address < (start := starts[place - 1]) + by_address[start].nbytes():
            users.setdefault(start, []).append(weakref.ref(array))
    for start, known in users.items():
        setattr(by_address[start], ARRAYS, known)


def _all_tensors() -> list[torch.Tensor]:
    """Returns every tensor object of the process.

    One call in C, during which no other thread runs: Python cannot finish a tuple that another thread is building if
    there is another reference to it, such as from a list of all objects.
    """
    import torch

    everything = itertools.chain.from_iterable(map(gc.get_objects, (None,)))
    return list(filter(functools.partial(type.__instancecheck__, torch._C.TensorBase), everything))


def _find_views(storages: Iterable[ManagedStorage]) -> None:
    """Adds every tensor object of the process over these storages to their `other_tensors`. Scans all objects."""
    import torch

    wanted = {managed.key: managed for managed in storages}
    if not wanted:
        return
    known = {
        id(tensor)
        for managed in wanted.values()
        for tensor in (managed.byte_view, *managed.tensors.values(), *managed.other_tensors)
    }
    for thing in _all_tensors():
        if id(thing) not in known and BYTE_VIEW not in vars(thing):
            try:
                with torch._C.DisableTorchFunctionSubclass():
                    managed = wanted.get(torch.Tensor.untyped_storage(thing)._cdata)
            except Exception:  # no storage
                continue
            if managed is not None:
                managed.other_tensors.append(thing)


def in_held_containers(entered: list[Any], tensors: list[Any], engine: int) -> frozenset[int]:
    """Returns the tensors (``id``) reachable through a container with references from outside the engine.

    Only paths through nothing but containers count. An instance held outside does not count: a loader may keep
    references to modules, but that is no cache.

    Args:
        entered: all objects entered by a walk, each once, without tensors. The caller has no other reference to any of
            them.
        tensors: all tensors that were found.
        engine: the engine (``id``), to which the loader's caller refers.
    """
    classes = {cls for cls in set(map(type, entered)) if issubclass(cls, _CONTAINERS)}
    containers = [thing for thing in entered if type(thing) in classes]
    [ours] = reference_counts([object()])
    ours += 1  # the list ``entered``
    counts = {
        id(container): count - ours
        for container, count in zip(containers, reference_counts(containers), strict=True)
        # One is the reference by which the walk reached it.
        if count > ours + 1 and id(container) != engine
    }
    by_id = dict(zip(map(id, containers), containers, strict=True))
    wanted = frozenset(map(id, tensors))
    if not _reached_from(counts, by_id, wanted):
        return frozenset()
    inside = _references_inside(itertools.chain(_batches(entered), _batches(tensors)), counts.keys())
    return _reached_from([key for key, count in counts.items() if count > inside[key]], by_id, wanted)


def _reached_from(keys: Iterable[int], containers: dict[int, Any], wanted: frozenset[int]) -> frozenset[int]:
    """Returns those of ``wanted`` (``id``) to which these containers lead, directly or through further ones."""
    new = set(keys)
    seen: set[int] = set()
    while new - seen:
        todo = [containers[key] for key in new - seen if key in containers]
        seen |= new
        new = set(map(id, gc.get_referents(*todo)))
    return wanted & seen


def _batches(things: list[Any]) -> Iterable[list[Any]]:
    return (things[start : start + _BATCH] for start in range(0, len(things), _BATCH))


def _references_inside(batches: Iterable[list[Any]], wanted: AbstractSet[int]) -> collections.Counter[int]:
    """Counts the references of these objects to each of ``wanted`` (``id``)."""
    kinds: dict[type, ObjectKind] = {}
    inside: collections.Counter[int] = collections.Counter()
    for batch in batches:
        for cls in set(map(type, batch)) - kinds.keys():
            kinds[cls] = kind_of(cls)
        by_name = [thing for thing in batch if kinds[type(thing)] is ObjectKind.BY_NAME]
        others = [thing for thing in batch if kinds[type(thing)] is not ObjectKind.BY_NAME] if by_name else batch
        inside.update(_among(gc.get_referents(*others), wanted))
        for thing in by_name:
            named: collections.Counter[int] = collections.Counter()
            with contextlib.suppress(Exception):  # logged by the walk
                named.update(_among((child for _, _, child in children(thing)), wanted))
            # The collector sees through iterators. Not for a cache, whose results do not belong to the engine.
            seen = () if type(thing) is _CACHE else gc.get_referents(thing)
            inside += named | collections.Counter(_among(seen, wanted))
    return inside


def _among(things: Iterable[Any], wanted: AbstractSet[int]) -> Iterable[int]:
    return filter(wanted.__contains__, map(id, things))


def add_owner_locked(owner: Any) -> None:
    _owners.add(owner)


def owned_storages() -> dict[int, ManagedStorage]:
    """Returns every storage that has an owner, by ``_cdata``."""
    return {managed.key: managed for owner in list(_owners) for managed in owner.storages}


def are_managed(tensors: Iterable[torch.Tensor]) -> bool:
    """Returns whether some of these tensors are managed, wherever their bytes are now."""
    with owners_lock:
        return not owned_storages().keys().isdisjoint({tensor.untyped_storage()._cdata for tensor in tensors})


def find_common_locked(storages: list[ManagedStorage]) -> list[ManagedStorage]:
    """Returns those of ``storages`` that have another owner and a third holder, such as a cache of constants.

    They stay on the device from now on, since neither engine may take them from the other.

    Raises:
        SharedWeights: some belong to another owner and have no third holder, or they are most of the bytes.
    """
    others = owned_storages()
    shared = {managed: other for managed in storages if (other := others.get(managed.key)) is not None}
    shared_bytes, all_bytes = (sum(managed.nbytes for managed in some) for some in (shared, storages))
    if shared and (2 * shared_bytes > all_bytes or not all(other.held_elsewhere for other in shared.values())):
        raise SharedWeights(tuple(path for managed in shared for path in managed.tensors))
    for other in shared.values():
        other.stays_on_device = True
    return list(shared)
