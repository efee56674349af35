"""Tensors, moved by their unique storages: ties, views and tensor identity survive because only bytes move.

A storage is emptied with ``resize_(0)`` and filled again with ``resize_(n)`` and a copy, as PyTorch's FSDP2
does (``torch/distributed/fsdp/_fully_shard/_fsdp_param.py``); every tensor over it stays the object it was.

Weights of an inference engine do not change, so one copy in main memory, the mirror, is made at the first offload
and kept. Later offloads compare fingerprints on the device, copy back what did change, and drop the rest.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from ..contracts import Device, SnapshotStore
from ..errors import DeviceOutOfMemory, SnapshotUnusable
from ..locks import renewed_in_children
from ..observability.error_classification import is_out_of_device_memory
from ..progress import Progress, current
from ..sentences import Sentence
from . import absent_tensors, storage_owners
from .checksum import fingerprints, hash_of
from .copying import SpanCopier
from .fallback_restore import FallbackCopy, FallbackRestore
from .holders import are_held, part_from_strangers
from .mirror import HostMirror
from .mirror_layout import MirrorLayout, MirrorSpan, lay_out
from .pinning import BackgroundPinning
from .storages import ManagedStorage, hide_tensors, managed_storages, show_tensors

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_SKELETON_BYTES = 64 << 20
"""What may stay in main memory of an engine whose weights are in a snapshot: tensors that compute there."""

_USE_ENDS_WITHIN_S = 0.02
_BYTES_PER_S = 1 << 30
_LONGEST_USE_S = 0.5
"""How long a use of a constant by another thread may take: at least, for each byte, and at most."""


class Weights:
    """Tensors of one engine. Storages that the device does not hold stay where they are and are only counted.

    Each move is all or nothing. Storages that repeat one value are remembered as that value and refilled. While the
    bytes are away, each use of the tensors raises `TensorAway`; see `residency.memory.absent_tensors`.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        device: Device,
        ephemeral: bool = False,
        held: AbstractSet[int] | None = None,
    ) -> None:
        """Take stock of ``tensors`` (by path, for messages) and charge the device; `DeviceOutOfMemory` if too many.

        ``ephemeral`` ones will be others the next time, so that a snapshot of them is of use once. ``held`` are those
        (``id``) that others than the engine hold, see `_mark_held`; None if that does not matter.
        """
        self._device = device
        self._ephemeral = ephemeral
        self._storages: list[ManagedStorage] = []
        self._elsewhere: list[ManagedStorage] = []
        #: Those that others than the engine hold too; see `_mark_held`.
        self._held: list[ManagedStorage] = []
        #: Those that are on the device while the others are away.
        self._here: set[ManagedStorage] = set()
        storages = managed_storages(tensors)
        with storage_owners.lock:
            #: Of another engine, where they are counted and stay on the device.
            self._common = storage_owners.find_common_locked(storages)
            for managed in storages:
                if managed in self._common:
                    continue
                movable = all(map(device.holds_tensor, managed.tensors.values())) and managed.make_resizable()
                (self._storages if movable else self._elsewhere).append(managed)
            device.charge(self._movable_bytes)
            if held is not None:
                self._mark_held(held)  # before another engine can find out that they are shared
            storage_owners.add_locked(self)
        self.on_device = True  # where the movable ones are
        self._layout = MirrorLayout((), (0,), 0)
        self._mirror: HostMirror | None = None
        #: Of each span, as last copied to the mirror; None where the mirror must not be trusted.
        self._fingerprints: list[int | None] = []
        self._saved: list[int] | None = None
        self._allocation: Any = None
        self._moving = renewed_in_children(threading.Lock())
        self._pinning: BackgroundPinning | None = None

    @property
    def storage_keys(self) -> frozenset[int]:
        """Every storage that is accounted for here, movable or not (``_cdata``), or with another engine."""
        common = {managed.key for managed in self._common}
        if common:
            common &= storage_owners.taken().keys()
        return frozenset([managed.key for managed in (*self._storages, *self._elsewhere)]) | common

    @property
    def has_common(self) -> bool:
        """Whether another engine counts some of the storages, for as long as it has them."""
        return bool(self._common)

    @property
    def storages(self) -> Iterable[ManagedStorage]:
        """The movable ones."""
        return self._storages

    @property
    def _movable_bytes(self) -> int:
        return sum([managed.nbytes for managed in self._storages])

    @property
    def _elsewhere_bytes(self) -> int:
        return sum(managed.nbytes for managed in self._elsewhere)

    @property
    def device_bytes(self) -> int:
        """While away: of what stays, and of what others hold and have brought back."""
        return self._movable_bytes if self.on_device else self._here_bytes

    @property
    def _here_bytes(self) -> int:
        return sum(managed.nbytes for managed in self._here)

    @property
    def host_bytes(self) -> int:
        spare_bytes = sum(managed.nbytes for managed in self._held if managed.fallback_copy is not None)
        return self._elsewhere_bytes + spare_bytes + (self._layout.nbytes if self._mirror else 0)

    # -- moves --------------------------------------------------------------------------------------------------

    def offload(self) -> int:
        if not self.on_device:
            return 0
        import torch

        with self._moving, torch.inference_mode():
            self._device.wait()
            try:
                self._let_uses_end()
                with torch._C.DisableTorchFunctionSubclass():
                    for managed in [
                        managed for managed in self._storages if managed.storage.nbytes() != managed.nbytes
                    ]:
                        self._follow(managed)
                    self._leave_behind(part_from_strangers(self._storages))
                with self._device.transfer():
                    if self._mirror is None:
                        self._make_mirror()
                    self._update_mirror()
            except BaseException:
                show_tensors(self._held)
                raise
            self._here = {managed for managed in self._storages if managed.stays_on_device}
            for managed in self._held:  # once more: some may have a new storage
                setattr(managed.storage, absent_tensors.RECALL, FallbackRestore(self.bring_back, managed))
            self.on_device = False
            self._empty([managed for managed in self._storages if not managed.stays_on_device])
            if self._pinning is None:
                self._pinning = BackgroundPinning(self._ready_mirror(), self._device, self._moving)
        return self._movable_bytes - self._here_bytes

    def _let_uses_end(self) -> None:
        """Lets other threads end their uses of what others than the engine hold: they need no lease for that.

        A use that begins now waits until the move has ended, and then brings the bytes back. One that has begun is
        given the time to end.
        """
        leaving = [managed for managed in self._held if not managed.stays_on_device]
        if not leaving:
            return
        for managed in leaving:
            setattr(managed.storage, absent_tensors.RECALL, FallbackRestore(self.bring_back, managed))
        hide_tensors(leaving)
        time.sleep(min(_USE_ENDS_WITHIN_S + sum(managed.nbytes for managed in leaving) / _BYTES_PER_S, _LONGEST_USE_S))
        self._device.wait()

    def _leave_behind(self, storages: list[ManagedStorage]) -> None:
        """Take these for storages that stay where they are: shared with other processes since the load, for one."""
        if not storages:
            return
        self._drop_mirror()
        self._device.refund(sum(managed.nbytes for managed in storages))
        self._elsewhere += storages
        staying = set(storages)
        self._storages = [managed for managed in self._storages if managed not in staying]
        self._held = [managed for managed in self._held if managed not in staying]

    def restore(self) -> int:
        if self.on_device:
            return 0
        import torch

        mirror, progress = self._ready_mirror(), current()
        copier = SpanCopier(self._storages, self._layout, self._here)
        if self._layout.nbytes:
            progress.enter("copying", self._layout.nbytes)
        with self._moving, torch.inference_mode():
            away = [managed for managed in self._storages if managed not in self._here]
            try:
                with self._device.placing() as self._allocation:
                    self._allocate(away)
                with self._device.transfer():
                    for span in self._layout.spans:
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
                    free_bytes = self._device.memory().free_bytes
                    raise DeviceOutOfMemory(self._movable_bytes, free_bytes, error.device, error.holders) from error
                raise
            absent_tensors.reopen([managed.storage for managed in away])
            show_tensors(self._storages)
            moved_bytes = self._movable_bytes - self._here_bytes
            self.on_device = True
            self._here.clear()
        return moved_bytes

    def release(self) -> int:
        """Frees everything; what others than the engine hold survives, on the device if it is there."""
        import torch

        freed_bytes = self.device_bytes + self.host_bytes
        pinning = self._pinning
        with self._moving, torch.inference_mode():
            if self.on_device:
                with contextlib.suppress(Exception):  # of a device that is gone: nothing is under way there
                    self._device.wait()
            self._bury()
            self._drop_mirror()
        if pinning is not None:
            pinning.join()
        return freed_bytes

    def also(self, groups: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """Take note of the tensors that are over the storages accounted for here now (`by_storage`)."""
        for managed in self._storages:
            group = groups.get(managed.key)
            if group is not None:
                managed.tensors = group

    def keep_only(self, kept_keys: Collection[int]) -> bool:
        """Take no further care of storages that are not among these.

        They stay on the device, filled, as long as somebody has them. Returns whether there were any.
        """
        gone = [managed for managed in self._storages if managed.key not in kept_keys]
        if not gone:
            return False
        with self._moving:
            self._drop_mirror()
        self._device.refund(sum(managed.nbytes for managed in gone))
        self._storages = [managed for managed in self._storages if managed.key in kept_keys]
        self._held = [managed for managed in self._held if managed.key in kept_keys]
        return True

    # -- what others hold ---------------------------------------------------------------------------------------

    def _mark_held(self, tensors: AbstractSet[int]) -> None:
        """Take note that others than the engine hold some: these (``id``), and storages that have unknown holders.

        They move like the others, but come back one by one when they are used, and survive a release.
        """
        self._held = are_held(self._storages, tensors)
        for managed in self._held:
            managed.held_elsewhere = True
            if not hasattr(managed.storage, absent_tensors.NAMED):
                setattr(managed.storage, absent_tensors.NAMED, True)
                logger.info(
                    "%s: its %s bytes are held by others than the engine too, and survive its release",
                    managed.path,
                    f"{managed.nbytes:,}",
                )

    def bring_back(self, managed: ManagedStorage) -> bool:
        """Put one storage that others hold on the device while the rest is away; False if it is not here any more.

        Thread-safe; waits for a move to end. `DeviceOutOfMemory` if there is no room for it.
        """
        import torch

        with self._moving, torch.inference_mode():
            if managed not in self._held:
                return False
            if not self.on_device and managed not in self._here:
                try:
                    self._allocate([managed])
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
        """Write what main memory has of one storage to ``target``, uint8 [storage.nbytes]."""
        if managed.fallback_copy is not None:
            target.copy_(managed.fallback_copy)
        elif managed.constant is not None:
            managed.write_constant(target)
        else:
            self._ready_mirror().read(self._storages.index(managed), target)

    def _copy_of(self, managed: ManagedStorage) -> torch.Tensor:
        import torch

        copy = torch.empty(managed.nbytes, dtype=torch.uint8)
        self._copy_to(managed, copy)
        return copy

    def _bury(self) -> None:
        """Let go of everything. Needs no room on the device."""
        there = self._storages if self.on_device else list(self._here)
        kept = set(are_held(there, frozenset())) | {
            managed
            for managed in there
            if managed.held_elsewhere
            or managed.stays_on_device
            or not managed.storage.resizable()
            or (managed.count_unknown_holders() > 0 and managed.is_exported())
        }
        self._device.refund(sum(managed.nbytes for managed in kept))
        away = [] if self.on_device else [managed for managed in self._storages if managed not in self._here]
        for managed in away:
            if managed.held_elsewhere:
                setattr(managed.storage, absent_tensors.RECALL, FallbackCopy(managed, self._copy_of(managed)))
        absent_tensors.close((managed.storage for managed in away if not managed.held_elsewhere), released=True)
        self._empty([managed for managed in there if managed not in kept], released=True)
        self.on_device = False
        self._storages, self._elsewhere, self._held, self._here, self._common = [], [], [], set(), []

    # -- snapshots ----------------------------------------------------------------------------------------------

    def save(self, store: SnapshotStore, name: str) -> int:
        if self._elsewhere_bytes > _SKELETON_BYTES:
            raise SnapshotUnusable(
                name,
                Sentence(
                    f"{self._elsewhere_bytes:,} bytes of it live in main memory and would stay there",
                    f"其中 {self._elsewhere_bytes:,} 字节位于内存并会留在那里",
                ),
            )
        self.offload()
        with self._moving:
            mirror = self._ready_mirror()
            hashes = [hash_of(mirror.span(span)) for span in self._layout.spans]
            if hashes:
                store.write(name, self._ranges(), hashes, mirror.raw)
            self._saved = hashes
            for managed in self._held:
                managed.fallback_copy = self._copy_of(managed)
            pinning = self._pinning
            self._drop_mirror()
        if pinning is not None:
            pinning.join()
        return self._layout.nbytes

    def load(self, store: SnapshotStore, name: str) -> int:
        if self._saved is None:
            raise SnapshotUnusable(name, Sentence("nothing was saved", "没有保存任何内容"))
        mirror = HostMirror(self._layout, self._moving)
        if self._saved:
            store.read(name, self._ranges(), self._saved, mirror.raw, once=self._ephemeral)
        self._mirror, self._saved = mirror, None
        for managed in self._held:
            managed.fallback_copy = None
        return self._layout.nbytes

    def _ranges(self) -> list[tuple[int, int]]:
        return [(span.start, span.stop) for span in self._layout.spans]

    def _follow(self, managed: ManagedStorage) -> None:
        """Take note of a storage that the engine itself has made longer or shorter."""
        # Not charged: the bytes are there already, whatever the books would allow.
        self._device.refund(managed.nbytes - managed.storage.nbytes())
        managed.measure()
        self._drop_mirror()

    # -- the mirror ---------------------------------------------------------------------------------------------

    def _make_mirror(self) -> None:
        for managed in self._storages:
            managed.constant = managed.find_constant()
        self._layout = lay_out([0 if managed.constant is not None else managed.nbytes for managed in self._storages])
        self._mirror = HostMirror(self._layout, self._moving)
        self._fingerprints = [None] * len(self._layout.spans)

    def _update_mirror(self) -> None:
        """Copy back every span that is not what the mirror has; the mirror is then equal to the device."""
        if any(
            managed.constant is not None and managed.find_constant() != managed.constant for managed in self._storages
        ):
            # Something was written into a storage that had one value: it needs a place in the mirror now.
            self._drop_mirror()
            self._make_mirror()
        mirror, progress = self._ready_mirror(), current()
        spans, copier = self._layout.spans, SpanCopier(self._storages, self._layout)
        if spans:
            progress.enter("checking", self._layout.nbytes)
        now, known = _fingerprints(copier, spans, progress), self._fingerprints
        changed = [index for index, number in enumerate(now) if number is None or number != known[index]]
        if changed:
            progress.enter("copying", sum(spans[index].nbytes for index in changed))
        for index in changed:
            known[index] = None  # until the copy is whole
            copier.to_host(spans[index], mirror.span(spans[index]), put_together=now[index] is not None)
            known[index] = now[index]
            progress.advance(spans[index].nbytes)

    def _ready_mirror(self) -> HostMirror:
        assert self._mirror is not None, "what is off the device has a mirror"
        return self._mirror

    def _drop_mirror(self) -> None:
        if self._pinning is not None:
            self._pinning.stop()
            self._pinning = None
        if self._mirror is not None:
            self._mirror.unpin()
            self._mirror = None

    def _part_from_numpy(self, managed: ManagedStorage, released: bool) -> None:
        """Give a closed storage a storage of its own: numpy has looked at it since it was last checked."""
        import torch

        absent_tensors.reopen([managed.storage])
        recall = getattr(managed.storage, absent_tensors.RECALL, None)
        with torch.inference_mode(), torch._C.DisableTorchFunctionSubclass():
            managed.make_resizable()
        if recall is not None:
            setattr(managed.storage, absent_tensors.RECALL, recall)
        absent_tensors.close([managed.storage], released)

    def _allocate(self, storages: list[ManagedStorage]) -> None:
        """Give closed storages room for their bytes, and leave them closed."""
        empty = [managed for managed in storages if not managed.storage.nbytes()]
        opened = absent_tensors.opened_one_by_one(managed.key for managed in empty)
        for managed, _ in zip(empty, opened, strict=True):
            self._device.allocate(managed.storage, managed.nbytes)

    def _empty(self, storages: list[ManagedStorage], released: bool = False) -> None:
        hide_tensors(storages)
        absent_tensors.close((managed.storage for managed in storages), released)
        with contextlib.suppress(Exception):  # a capture under way, or a device that is lost: the bytes go all the same
            self._device.wait()  # for uses without a lease that began before
        filled = [managed for managed in storages if managed.storage.nbytes()]
        for managed in [managed for managed in filled if not managed.storage.resizable()]:
            self._part_from_numpy(managed, released)
        for managed, _ in zip(filled, absent_tensors.opened_one_by_one(managed.key for managed in filled), strict=True):
            self._device.drop(managed.storage)
        self._allocation = None
        try:
            self._device.settle()
        except Exception:
            # The bytes are gone from here; a device in trouble will say so again at the next restore.
            logger.exception("The device did not settle")


def _fingerprints(copier: SpanCopier, spans: Sequence[MirrorSpan], progress: Progress) -> Sequence[int | None]:
    """Of each span on the device; None for all of them if it has no room for computing them."""

    def gathered() -> Iterator[torch.Tensor]:
        for span in spans:
            yield copier.gathered(span)
            progress.advance(span.nbytes)

    try:
        return fingerprints(gathered(), len(spans))
    except RuntimeError as error:
        if not is_out_of_device_memory(error):
            raise
        logger.info("The device is too full to compare weights there; all of them are copied back")
    return [None] * len(spans)
