"""Gives storages their bytes on the device, and takes them away; uses of the tensors raise `TensorAway` meanwhile."""

from __future__ import annotations

import contextlib

from ..contracts import Device
from . import absent_tensors
from .storages import ManagedStorage, hide_tensors


def allocate(storages: list[ManagedStorage], device: Device) -> None:
    """Allocates the bytes of closed storages, and leaves them closed. `DeviceOutOfMemory` if there is no room."""
    empty = [managed for managed in storages if not managed.storage.nbytes()]
    opened = absent_tensors.opened_one_by_one(managed.key for managed in empty)
    for managed, _ in zip(empty, opened, strict=True):
        device.allocate(managed.storage, managed.nbytes)


def drop(storages: list[ManagedStorage], device: Device, released: bool = False) -> None:
    """Closes storages and frees their bytes. Needs no room on the device; ``released`` says that they stay away."""
    hide_tensors(storages)
    absent_tensors.close((managed.storage for managed in storages), released)
    with contextlib.suppress(Exception):  # a capture under way, or a device that is lost: the bytes go all the same
        device.wait()  # for uses without a lease that began before
    filled = [managed for managed in storages if managed.storage.nbytes()]
    for managed in filled:
        if not managed.storage.resizable():
            _part_from_numpy(managed, released)
    for managed, _ in zip(filled, absent_tensors.opened_one_by_one(managed.key for managed in filled), strict=True):
        device.drop(managed.storage)


def _part_from_numpy(managed: ManagedStorage, released: bool) -> None:
    """Gives a closed storage memory of its own: numpy has looked at it since it was last checked."""
    import torch

    absent_tensors.reopen([managed.storage])
    recall = getattr(managed.storage, absent_tensors.RECALL, None)
    with torch.inference_mode(), torch._C.DisableTorchFunctionSubclass():
        managed.make_resizable()
    if recall is not None:
        setattr(managed.storage, absent_tensors.RECALL, recall)
    absent_tensors.close([managed.storage], released)
