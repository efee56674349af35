"""Records the owner of each storage under management in this process: bytes can have one owner only."""

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
    """Has storages of its own."""

    @property
    def pieces(self) -> Iterable[ManagedStorage]: ...


_managed: weakref.WeakSet[Owner] = weakref.WeakSet()

#: Held while an owner takes stock, so that no other takes the same.
lock = renewed_in_children(threading.Lock())


def add_locked(owner: Owner) -> None:
    _managed.add(owner)


def taken() -> dict[int, ManagedStorage]:
    """Every piece that has an owner, by its storage (``_cdata``)."""
    return {piece.key: piece for owner in list(_managed) for piece in owner.pieces}


def are_managed(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether some of these are under management, wherever their bytes are now."""
    with lock:
        return not taken().keys().isdisjoint({tensor.untyped_storage()._cdata for tensor in tensors})


def find_common_locked(pieces: list[ManagedStorage]) -> list[ManagedStorage]:
    """Those of ``pieces`` that another owner has and a third party holds, a cache of constants for one.

    They stay on the device from now on, since neither engine may take them from the other.

    Raises:
        SharedWeights: some belong to another owner and nobody else holds them, or they are most of the bytes.
    """
    others = taken()
    shared = {piece: other for piece in pieces if (other := others.get(piece.key)) is not None}
    shared_bytes, all_bytes = (sum(piece.nbytes for piece in some) for some in (shared, pieces))
    if shared and (2 * shared_bytes > all_bytes or not all(other.held for other in shared.values())):
        raise SharedWeights(tuple(path for piece in shared for path in piece.tensors))
    for other in shared.values():
        other.stays = True
    return list(shared)
