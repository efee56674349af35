"""Records the owner of each managed storage of this process: a storage has at most one."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from ..errors import SharedWeights
from ..locks import renewed_in_children
from .storages import ManagedStorage

if TYPE_CHECKING:
    import torch


class Owner(Protocol):
    @property
    def storages(self) -> Iterable[ManagedStorage]: ...


_managed: weakref.WeakSet[Owner] = weakref.WeakSet()

#: Held while an owner claims storages, so that no other claims the same.
lock = renewed_in_children(threading.Lock())


def add_locked(owner: Owner) -> None:
    _managed.add(owner)


def taken() -> dict[int, ManagedStorage]:
    """Returns every storage that has an owner, by ``_cdata``."""
    return {managed.key: managed for owner in list(_managed) for managed in owner.storages}


def are_managed(tensors: Iterable[torch.Tensor]) -> bool:
    """Returns whether some of these tensors are managed, wherever their bytes are now."""
    with lock:
        return not taken().keys().isdisjoint({tensor.untyped_storage()._cdata for tensor in tensors})


def find_common_locked(storages: list[ManagedStorage]) -> list[ManagedStorage]:
    """Returns those of ``storages`` that have another owner and a third holder, such as a cache of constants.

    They stay on the device from now on, since neither engine may take them from the other.

    Raises:
        SharedWeights: some belong to another owner and have no third holder, or they are most of the bytes.
    """
    others = taken()
    shared = {managed: other for managed in storages if (other := others.get(managed.key)) is not None}
    shared_bytes, all_bytes = (sum(managed.nbytes for managed in some) for some in (shared, storages))
    if shared and (2 * shared_bytes > all_bytes or not all(other.held_elsewhere for other in shared.values())):
        raise SharedWeights(tuple(path for managed in shared for path in managed.tensors))
    for other in shared.values():
        other.stays_on_device = True
    return list(shared)
