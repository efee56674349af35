"""Tensors, moved by their unique storages: ties, views and tensor identity survive because only bytes move.

A storage is emptied with ``resize_(0)`` and filled again with ``resize_(n)`` and a copy, as PyTorch's FSDP2
does (``torch/distributed/fsdp/_fully_shard/_fsdp_param.py``); every tensor over it stays the object it was.

Weights of an inference engine do not change, so one copy in main memory, the mirror, is made at the first offload
and kept. Later offloads compare checksums on the device, copy back what did change, and drop the rest.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from ..contracts import Device
from ..errors import DeviceOutOfMemory, SnapshotUnusable
from ..locks import renewed_in_children
from ..progress import current
from ..sentences import Sentence
from . import absent_tensors, holders
from .snapshot import SnapshotFolder
from .storage_bytes import FallbackCopy, allocate, drop, end_uses, restore_on_use
from .storages import ManagedStorage, managed_storages, show_tensors
from .weights_mirror import SpanCopier, WeightsMirror

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_SKELETON_BYTES = 64 << 20
"""Most bytes that stay in main memory while the weights are in a snapshot: tensors that compute there."""


class Weights:
    """Tensors of one engine. Storages that the device does not hold stay where they are and are only counted.

    Each move is all or nothing. Storages that repeat one value are remembered as that value and refilled. While the
    bytes are away, each use of the tensors raises `TensorAway`; see `residency.memory.absent_tensors`.

    Attributes:
        storages: the movable ones.
        on_device: whether these are on the device.
        mirror: their copy in main memory.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        device: Device,
        ephemeral: bool = False,
        held: AbstractSet[int] | None = None,
    ) -> None:
        """Manages ``tensors`` (by path, for messages) and charges the device; `DeviceOutOfMemory` if too many.

        ``ephemeral`` ones will be others the next time, so that a snapshot of them is of use once. ``held`` are those
        (``id``) that others than the engine hold, see `mark_held`; None if that does not matter.
        """
        self._device = device
        self._ephemeral = ephemeral
        self.storages: list[ManagedStorage] = []
        self._elsewhere: list[ManagedStorage] = []
        #: Those that others than the engine hold too; see `mark_held`.
        self._held: list[ManagedStorage] = []
        #: Those that are on the device while the others are away.
        self._here: set[ManagedStorage] = set()
        storages = managed_storages(tensors)
        with holders.owners_lock:
            #: Of another engine, where they are counted and stay on the device.
            self._common = holders.find_common_locked(storages)
            for managed in storages:
                if managed in self._common:
                    continue
                movable = all(map(device.holds_tensor, managed.tensors.values())) and managed.make_resizable()
                (self.storages if movable else self._elsewhere).append(managed)
            device.charge(_total_bytes(self.storages))
            if held is not None:
                # Before another engine can find out that they are shared.
                self._held = holders.mark_held(self.storages, held)
            holders.add_owner_locked(self)
        self.on_device = True
        self._allocation: Any = None
        self._moving = renewed_in_children(threading.Lock())
        self.mirror = WeightsMirror(device, self._moving)

    @property
    def storage_keys(self) -> frozenset[int]:
        """Every storage that is accounted for here, movable or not (``_cdata``), or with another engine."""
        common = {managed.key for managed in self._common}
        if common:
            common &= holders.owned_storages().keys()
        return frozenset([managed.key for managed in (*self.storages, *self._elsewhere)]) | common

    @property
    def has_common(self) -> bool:
        """Whether another engine counts some of the storages, for as long as it has them."""
        return bool(self._common)

    @property
    def device_bytes(self) -> int:
        """While away: of the storages that stay, and of those that others hold and have brought back."""
        return _total_bytes(self.storages if self.on_device else self._here)

    @property
    def host_bytes(self) -> int:
        spare = [managed for managed in self._held if managed.fallback_copy is not None]
        return _total_bytes(self._elsewhere) + _total_bytes(spare) + self.mirror.nbytes

    def offload(self) -> int:
        if not self.on_device:
            return 0
        import torch

        with self._moving, torch.inference_mode():
            self._device.wait()
            leaving = [managed for managed in self._held if not managed.stays_on_device]
            try:
                end_uses(leaving, self.bring_back, self._device)
                with torch._C.DisableTorchFunctionSubclass():
                    for managed in self.storages:
                        if managed.storage.nbytes() != managed.nbytes:  # the engine has resized it
                            # Not charged: the bytes are there already.
                            self._device.refund(managed.nbytes - managed.storage.nbytes())
                            managed.measure()
                            self.mirror.drop()
                    immovable = holders.detach_from_foreign_code(self.storages)
                if immovable:  # shared with other processes since the load, for one
                    self._end_management(immovable)
                    self._elsewhere += immovable
                with self._device.transfer():
                    self.mirror.update(self.storages)
            except BaseException:
                show_tensors(self._held)
                raise
            self._here = {managed for managed in self.storages if managed.stays_on_device}
            restore_on_use(self._held, self.bring_back)  # once more: some may have a new storage
            self.on_device = False
            self._empty([managed for managed in self.storages if not managed.stays_on_device])
            self.mirror.pin_in_background()
        return self._away_bytes

    @property
    def _away_bytes(self) -> int:
        return _total_bytes(self.storages) - _total_bytes(self._here)

    def _end_management(self, leaving: Collection[ManagedStorage]) -> None:
        """Leaves these storages in place, filled, while they are referenced."""
        self.mirror.drop()
        self._device.refund(_total_bytes(leaving))
        gone = set(leaving)
        self.storages = [managed for managed in self.storages if managed not in gone]
        self._held = [managed for managed in self._held if managed not in gone]

    def restore(self) -> int:
        if self.on_device:
            return 0
        import torch

        mirror, layout, progress = self.mirror.memory, self.mirror.layout, current()
        copier = SpanCopier(self.storages, layout, self._here)
        if layout.nbytes:
            progress.enter("copying", layout.nbytes)
        with self._moving, torch.inference_mode():
            away = [managed for managed in self.storages if managed not in self._here]
            try:
                with self._device.placing() as self._allocation:
                    allocate(away, self._device)
                with self._device.transfer():
                    for span in layout.spans:
                        with absent_tensors.opened(copier.untyped_storages(span)):
                            copier.to_device(span, mirror.span(span))
                        progress.advance(span.nbytes)
                    for managed in away:
                        if managed.constant is not None:
                            with absent_tensors.opened([managed.storage]):
                                managed.write_constant(managed.byte_view)
            except BaseException as error:
                self._empty(away)
                if isinstance(error, DeviceOutOfMemory):
                    needed_bytes, free_bytes = _total_bytes(self.storages), self._device.memory().free_bytes
                    raise DeviceOutOfMemory(needed_bytes, free_bytes, error.device, error.holders) from error
                raise
            absent_tensors.reopen([managed.storage for managed in away])
            show_tensors(self.storages)
            moved_bytes = self._away_bytes
            self.on_device = True
            self._here.clear()
        return moved_bytes

    def release(self) -> int:
        """Frees everything; needs no room on the device.

        Storages that others than the engine hold survive, on the device if they are there.
        """
        import torch

        freed_bytes = self.device_bytes + self.host_bytes
        with self._moving, torch.inference_mode():
            if self.on_device:
                with contextlib.suppress(Exception):  # of a device that is gone: nothing is under way there
                    self._device.wait()
            self._free_storages()
            pinning = self.mirror.drop()
        if pinning is not None:
            pinning.join()
        return freed_bytes

    def _free_storages(self) -> None:
        there = self.storages if self.on_device else list(self._here)
        kept = set(holders.are_held(there, frozenset())) | {
            managed
            for managed in there
            if managed.held_elsewhere
            or managed.stays_on_device
            or not managed.storage.resizable()
            or (managed.count_unknown_holders() > 0 and managed.is_exported())
        }
        self._device.refund(_total_bytes(kept))
        away = [] if self.on_device else [managed for managed in self.storages if managed not in self._here]
        for managed in away:
            if managed.held_elsewhere:
                setattr(managed.storage, absent_tensors.RECALL, FallbackCopy(managed, self._copy_of(managed)))
        absent_tensors.close((managed.storage for managed in away if not managed.held_elsewhere), released=True)
        self._empty([managed for managed in there if managed not in kept], released=True)
        self.on_device = False
        self.storages, self._elsewhere, self._held, self._here, self._common = [], [], [], set(), []

    def update_tensors(self, groups: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """Replaces the known tensors over each storage by those of a new walk (`by_storage`)."""
        for managed in self.storages:
            managed.tensors = groups.get(managed.key, managed.tensors)

    def keep_only(self, kept_keys: Collection[int]) -> bool:
        """Ends the management of all other storages, which stay on the device; returns whether there were any."""
        gone = [managed for managed in self.storages if managed.key not in kept_keys]
        if gone:
            with self._moving:
                self._end_management(gone)
        return bool(gone)

    def bring_back(self, managed: ManagedStorage) -> bool:
        """Restores one storage that others hold while the rest is away; returns False if it is not here any more.

        Thread-safe; waits for a move to end. `DeviceOutOfMemory` if there is no room for it.
        """
        import torch

        with self._moving, torch.inference_mode():
            if managed not in self._held:
                return False
            if not self.on_device and managed not in self._here:
                try:
                    allocate([managed], self._device)
                    with self._device.transfer(), absent_tensors.opened([managed.storage]):
                        self._copy_to(managed, managed.byte_view)
                except BaseException:
                    self._empty([managed])
                    raise
                self._here.add(managed)
            absent_tensors.reopen([managed.storage])
            show_tensors([managed])  # a forked child may find it hidden for a move, which is the parent's
        return True

    def _copy_to(self, managed: ManagedStorage, target: torch.Tensor) -> None:
        """Copies the bytes of one storage from main memory to ``target``, uint8 [storage.nbytes]."""
        if managed.fallback_copy is not None:
            target.copy_(managed.fallback_copy)
        elif managed.constant is not None:
            managed.write_constant(target)
        else:
            self.mirror.memory.read(self.storages.index(managed), target)

    def _copy_of(self, managed: ManagedStorage) -> torch.Tensor:
        import torch

        copy = torch.empty(managed.nbytes, dtype=torch.uint8)
        self._copy_to(managed, copy)
        return copy

    def save(self, store: SnapshotFolder, name: str) -> int:
        left_bytes = _total_bytes(self._elsewhere)
        if left_bytes > _SKELETON_BYTES:
            raise SnapshotUnusable(
                name,
                Sentence(
                    f"{left_bytes:,} bytes of it live in main memory and would stay there",
                    f"其中 {left_bytes:,} 字节位于内存并会留在那里",
                ),
            )
        self.offload()
        with self._moving:
            self.mirror.save(store, name)
            for managed in self._held:
                managed.fallback_copy = self._copy_of(managed)
            pinning = self.mirror.drop()
        if pinning is not None:
            pinning.join()
        return self.mirror.layout.nbytes

    def load(self, store: SnapshotFolder, name: str) -> int:
        self.mirror.load(store, name, once=self._ephemeral)
        for managed in self._held:
            managed.fallback_copy = None
        return self.mirror.layout.nbytes

    def _empty(self, storages: list[ManagedStorage], released: bool = False) -> None:
        drop(storages, self._device, released)
        self._allocation = None
        try:
            self._device.settle()
        except Exception:
            # The bytes are freed already; a device in trouble raises again at the next restore.
            logger.exception("The device did not return freed memory to its driver")


def _total_bytes(storages: Iterable[ManagedStorage]) -> int:
    return sum([managed.nbytes for managed in storages])
