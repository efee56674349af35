"""Gives storages their bytes on the device and takes them away; restores some when they are used meanwhile.

Uses of tensors without bytes raise `TensorAway`, or restore the bytes if the storage is also held outside its engine.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..contracts import Device
from ..locks import renewed_in_children
from . import absent_tensors
from .storages import ManagedStorage, as_bytes, hide_tensors

if TYPE_CHECKING:
    import torch

_USE_ENDS_WITHIN_S = 0.02
_BYTES_PER_S = 1 << 30
_LONGEST_USE_S = 0.5
"""Time for other threads to end a use: minimum, bytes per second, maximum."""


def allocate(storages: list[ManagedStorage], device: Device) -> None:
    """Allocates the bytes of closed storages, and leaves them closed. `DeviceOutOfMemory` if there is no room."""
    empty = [managed for managed in storages if not managed.storage.nbytes()]
    with absent_tensors.opened_one_by_one([managed.key for managed in empty]) as opened:
        for managed, _ in zip(empty, opened, strict=True):
            device.allocate(managed.storage, managed.nbytes)


def drop(storages: list[ManagedStorage], device: Device, released: bool = False) -> None:
    """Closes storages and frees their bytes, permanently if ``released``. Needs no room on the device."""
    hide_tensors(storages)
    absent_tensors.close((managed.storage for managed in storages), released)
    with contextlib.suppress(Exception):  # a capture under way, or a lost device: the bytes are freed nevertheless
        device.wait()  # for uses without a lease that began before
    filled = [managed for managed in storages if managed.storage.nbytes()]
    for managed in filled:
        if not managed.storage.resizable():
            _detach_from_numpy(managed, released)
    with absent_tensors.opened_one_by_one([managed.key for managed in filled]) as opened:
        for managed, _ in zip(filled, opened, strict=True):
            device.drop(managed.storage)


def _detach_from_numpy(managed: ManagedStorage, released: bool) -> None:
    """Gives a closed storage memory of its own, since a numpy array uses its bytes since the last check."""
    import torch

    absent_tensors.reopen([managed.storage])
    recall = getattr(managed.storage, absent_tensors.RECALL, None)
    with torch.inference_mode(), torch._C.DisableTorchFunctionSubclass():
        managed.make_resizable()
    if recall is not None:
        setattr(managed.storage, absent_tensors.RECALL, recall)
    absent_tensors.close([managed.storage], released)


class FallbackCopy:
    """A copy in main memory after the engine's release; freed at the first use, or with the last holder."""

    def __init__(self, managed: ManagedStorage, copy: torch.Tensor) -> None:
        self._copy: torch.Tensor | None = copy
        self._tensors = [weakref.ref(tensor) for tensor in (*managed.tensors.values(), *managed.other_tensors)]
        self._lock = renewed_in_children(threading.Lock())

    def __call__(self, storage: torch.UntypedStorage) -> bool:
        import torch

        with self._lock, torch.inference_mode():
            if self._copy is not None:
                with absent_tensors.opened([storage]):
                    storage.resize_(len(self._copy))
                    try:
                        as_bytes(storage, len(self._copy)).copy_(self._copy)
                    except BaseException:
                        storage.resize_(0)
                        raise
                self._copy = None
                absent_tensors.reopen([storage])
                absent_tensors.show_tensors(tensor for one in self._tensors if (tensor := one()) is not None)
        return True


def restore_on_use(storages: Iterable[ManagedStorage], bring_back: Callable[[ManagedStorage], bool]) -> None:
    """Makes each use of these storages call ``bring_back``, a method, while they are away. Keeps nothing alive."""
    method = weakref.WeakMethod(bring_back)
    for managed in storages:
        setattr(managed.storage, absent_tensors.RECALL, functools.partial(_restore, method, weakref.ref(managed)))


def _restore(
    method: weakref.WeakMethod[Callable[[ManagedStorage], bool]],
    reference: weakref.ref[ManagedStorage],
    storage: torch.UntypedStorage,
) -> bool:
    bring_back, managed = method(), reference()
    return bring_back is not None and managed is not None and bring_back(managed)


def end_uses(leaving: list[ManagedStorage], bring_back: Callable[[ManagedStorage], bool], device: Device) -> None:
    """Waits until other threads have ended their uses of these storages, which need no lease.

    A use that begins now waits until the move has ended, and then restores the bytes.
    """
    if not leaving:
        return
    restore_on_use(leaving, bring_back)
    hide_tensors(leaving)
    time.sleep(min(_USE_ENDS_WITHIN_S + sum(managed.nbytes for managed in leaving) / _BYTES_PER_S, _LONGEST_USE_S))
    device.wait()
