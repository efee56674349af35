"""Tensors, moved by their unique storages: ties, views and tensor identity survive because only bytes move.

A storage is emptied with ``resize_(0)`` and filled again with ``resize_(n)`` and a copy, as PyTorch's FSDP2
does (``torch/distributed/fsdp/_fully_shard/_fsdp_param.py``); every tensor over it stays the object it was.

Weights of an inference engine do not change, so one copy in main memory, the mirror, is made at the first offload
and kept. Later offloads compare fingerprints on the device, copy back what did change, and drop the rest.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..contracts import Device, SnapshotStore
from ..errors import DeviceOutOfMemory, SharedWeights, SnapshotUnusable
from ..progress import Progress, current
from .fingerprint import fingerprints, hash_of
from .layout import Layout, Span, lay_out
from .mirror import HostMirror
from .pieces import Piece, pieces_of
from .pinning import BackgroundPinning

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_SKELETON_BYTES = 64 << 20
"""What may stay in main memory of an engine whose weights are in a snapshot: tensors that compute there."""


#: All weights under management in this process: bytes can have one owner only.
_managed: weakref.WeakSet[Weights] = weakref.WeakSet()
_managed_lock = threading.Lock()


class Weights:
    """Tensors of one engine. Storages that the device does not hold stay where they are and are only counted.

    Each move is all or nothing. Storages that repeat one value are remembered as that value and refilled.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: Device, passing: bool = False) -> None:
        """Take stock of ``tensors`` (by path, for messages) and charge the device; `DeviceOutOfMemory` if too many.

        ``passing`` ones will be others the next time, so that a snapshot of them is of use once.
        """
        self._device = device
        self._passing = passing
        self._pieces: list[Piece] = []
        self._elsewhere: list[Piece] = []
        pieces = pieces_of(tensors)
        with _managed_lock:
            _refuse_shared(pieces)
            for piece in pieces:
                movable = all(map(device.holds_tensor, piece.tensors.values())) and piece.make_resizable()
                (self._pieces if movable else self._elsewhere).append(piece)
            device.charge(self._movable_bytes)
            _managed.add(self)
        self.on_device = True  # where the movable ones are
        self._layout = Layout((), (0,), 0)
        self._mirror: HostMirror | None = None
        #: Of each span, as last copied to the mirror; None where the mirror must not be trusted.
        self._fingerprints: list[int | None] = []
        self._saved: list[int] | None = None
        self._allocation: Any = None
        #: Small pieces are put together here, one span after the other, while they are compared and copied.
        self._scratch: torch.Tensor | None = None
        self._moving = threading.Lock()
        self._pinning: BackgroundPinning | None = None

    @property
    def storages(self) -> frozenset[int]:
        """Every storage that is accounted for here, movable or not (``_cdata``)."""
        return frozenset([piece.storage._cdata for piece in (*self._pieces, *self._elsewhere)])

    @property
    def _movable_bytes(self) -> int:
        return sum([piece.nbytes for piece in self._pieces])

    @property
    def _elsewhere_bytes(self) -> int:
        return sum(piece.nbytes for piece in self._elsewhere)

    @property
    def device_bytes(self) -> int:
        return self._movable_bytes if self.on_device else 0

    @property
    def host_bytes(self) -> int:
        return self._elsewhere_bytes + (self._layout.nbytes if self._mirror else 0)

    # -- moves --------------------------------------------------------------------------------------------------

    def offload(self) -> int:
        if not self.on_device:
            return 0
        import torch

        with self._moving, torch.inference_mode():
            self._device.settle()
            for piece in self._pieces:
                self._follow(piece)
            self._leave_behind([piece for piece in self._pieces if not piece.make_resizable()])
            if self._mirror is None:
                self._make_mirror()
            self._update_mirror()
            self.on_device = False
            self._empty()
            if self._pinning is None:
                self._pinning = BackgroundPinning(self._ready_mirror(), self._device, self._moving)
        return self._movable_bytes

    def _leave_behind(self, pieces: list[Piece]) -> None:
        """Take these for storages that stay where they are: shared with other processes since the load, for one."""
        if not pieces:
            return
        self._drop_mirror()
        self._device.refund(sum(piece.nbytes for piece in pieces))
        self._elsewhere += pieces
        staying = set(pieces)
        self._pieces = [piece for piece in self._pieces if piece not in staying]

    def restore(self) -> int:
        if self.on_device:
            return 0
        import torch

        mirror, progress = self._ready_mirror(), current()
        if self._layout.nbytes:
            progress.enter("copying", self._layout.nbytes)
        with self._moving, torch.inference_mode():
            try:
                with self._device.transfer() as self._allocation:
                    for piece in self._pieces:
                        if not piece.storage.nbytes():
                            self._device.allocate(piece.storage, piece.nbytes)
                    for span in self._layout.spans:
                        self._fill(span, mirror.span(span))
                        progress.advance(span.nbytes)
                    for piece in self._pieces:
                        if piece.fill is not None:
                            piece.refill()
            except BaseException as error:
                self._empty()
                if isinstance(error, DeviceOutOfMemory):
                    free_bytes = self._device.memory().free_bytes
                    raise DeviceOutOfMemory(self._movable_bytes, free_bytes, error.device, error.holders) from error
                raise
            self.on_device = True
        return self._movable_bytes

    def release(self) -> int:
        freed_bytes = self.device_bytes + self.host_bytes
        pinning = self._pinning
        with self._moving:
            if self.on_device:
                self._empty()
            self._drop_mirror()
        if pinning is not None:
            pinning.join()
        self.on_device = False
        self._pieces, self._elsewhere = [], []
        return freed_bytes

    def also(self, groups: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """Take note of the tensors that are over the storages accounted for here now (`by_storage`)."""
        for piece in self._pieces:
            group = groups.get(piece.storage._cdata)
            if group is not None:
                piece.tensors = group

    def keep_only(self, storages: Collection[int]) -> bool:
        """Take no further care of storages that are not among these.

        They stay on the device, filled, as long as somebody has them. Returns whether there were any.
        """
        gone = [piece for piece in self._pieces if piece.storage._cdata not in storages]
        if not gone:
            return False
        with self._moving:
            self._drop_mirror()
        self._device.refund(sum(piece.nbytes for piece in gone))
        self._pieces = [piece for piece in self._pieces if piece.storage._cdata in storages]
        return True

    # -- snapshots ----------------------------------------------------------------------------------------------

    def save(self, store: SnapshotStore, name: str) -> int:
        if self._elsewhere_bytes > _SKELETON_BYTES:
            raise SnapshotUnusable(
                name, f"{self._elsewhere_bytes:,} bytes of it live in main memory and would stay there"
            )
        self.offload()
        with self._moving:
            mirror = self._ready_mirror()
            hashes = [hash_of(mirror.span(span)) for span in self._layout.spans]
            if hashes:
                store.write(name, self._ranges(), hashes, mirror.raw)
            self._saved = hashes
            pinning = self._pinning
            self._drop_mirror()
        if pinning is not None:
            pinning.join()
        return self._layout.nbytes

    def load(self, store: SnapshotStore, name: str) -> int:
        if self._saved is None:
            raise SnapshotUnusable(name, "nothing was saved")
        mirror = HostMirror(self._layout)
        if self._saved:
            store.read(name, self._ranges(), self._saved, mirror.raw, once=self._passing)
        self._mirror, self._saved = mirror, None
        return self._layout.nbytes

    def _ranges(self) -> list[tuple[int, int]]:
        return [(span.start, span.stop) for span in self._layout.spans]

    def _follow(self, piece: Piece) -> None:
        """Take note of a storage that the engine itself has made longer or shorter."""
        grown_bytes = piece.storage.nbytes() - piece.nbytes
        if grown_bytes:
            # Not charged: the bytes are there already, whatever the books would allow.
            self._device.refund(-grown_bytes)
            piece.measure()
            self._drop_mirror()

    # -- the mirror ---------------------------------------------------------------------------------------------

    def _make_mirror(self) -> None:
        for piece in self._pieces:
            piece.fill = piece.find_fill()
        self._layout = lay_out([0 if piece.fill is not None else piece.nbytes for piece in self._pieces])
        self._mirror = HostMirror(self._layout)
        self._fingerprints = [None] * len(self._layout.spans)

    def _update_mirror(self) -> None:
        """Copy back every span that is not what the mirror has; the mirror is then equal to the device."""
        if any(piece.fill is not None and piece.find_fill() != piece.fill for piece in self._pieces):
            # Something was written into a storage that had one value: it needs a place in the mirror now.
            self._drop_mirror()
            self._make_mirror()
        mirror, progress = self._ready_mirror(), current()
        spans = self._layout.spans
        if spans:
            progress.enter("checking", self._layout.nbytes)
        now = fingerprints(self._gather_all(progress), len(spans))
        changed = [index for index, fingerprint in enumerate(now) if self._fingerprints[index] != fingerprint]
        if changed:
            progress.enter("copying", sum(spans[index].nbytes for index in changed))
        for index in changed:
            self._fingerprints[index] = None  # until the copy is whole
            mirror.span(spans[index]).copy_(self._gather(spans[index]))
            self._fingerprints[index] = now[index]
            progress.advance(spans[index].nbytes)
        self._scratch = None

    def _ready_mirror(self) -> HostMirror:
        assert self._mirror is not None, "what is off the device has a mirror"
        return self._mirror

    def _drop_mirror(self) -> None:
        if self._pinning is not None:
            self._pinning.stop()
            self._pinning = None
        if self._mirror is not None:
            self._mirror.unpin(self._device)
            self._mirror = None

    def _gather_all(self, progress: Progress) -> Iterator[torch.Tensor]:
        for span in self._layout.spans:
            yield self._gather(span)
            progress.advance(span.nbytes)

    def _gather(self, span: Span) -> torch.Tensor:
        """The bytes of a span where they are now, on the device; valid until the next span is gathered."""
        import torch

        parts = self._parts(span)
        if len(parts) == 1:
            return parts[0]
        if self._scratch is None:
            largest = max(span.nbytes for span in self._layout.spans)
            self._scratch = torch.empty(largest, dtype=torch.uint8, device=parts[0].device)
        return torch.cat(parts, out=self._scratch[: span.nbytes])

    def _parts(self, span: Span) -> list[torch.Tensor]:
        parts = []
        for part in span.parts:
            piece = self._pieces[part.piece]
            whole = part.stop - part.start == piece.nbytes
            parts.append(piece.raw if whole else piece.raw[part.start : part.stop])
        return parts

    def _fill(self, span: Span, source: torch.Tensor) -> None:
        """Write a span's bytes from main memory to where they belong on the device."""
        import torch

        parts = self._parts(span)
        if len(parts) == 1:
            parts[0].copy_(source, non_blocking=True)
            return
        # Many small pieces cross the bus together and are spread out there.
        arrived = source.to(parts[0].device, non_blocking=True)
        torch._foreach_copy_(parts, torch.split(arrived, [part.stop - part.start for part in span.parts]))

    def _empty(self) -> None:
        for piece in self._pieces:
            if piece.storage.nbytes() and piece.storage.resizable():
                self._device.drop(piece.storage)
            elif piece.storage.nbytes():
                # At a release: numpy looks at it, and the bytes live as long as it does.
                self._device.refund(piece.nbytes)
        self._allocation = None
        try:
            self._device.settle()
        except Exception:
            # The bytes are gone from here; a device in trouble will say so again at the next restore.
            logger.exception("The device did not settle")


def are_managed(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether some of these are under management, wherever their bytes are now."""
    with _managed_lock:
        return not {tensor.untyped_storage()._cdata for tensor in tensors}.isdisjoint(_taken())


def _taken() -> set[int]:
    return {piece.storage._cdata for other in _managed for piece in other._pieces}


def _refuse_shared(pieces: list[Piece]) -> None:
    taken = _taken()
    shared = [path for piece in pieces if piece.storage._cdata in taken for path in piece.tensors]
    if shared:
        raise SharedWeights(tuple(shared))
