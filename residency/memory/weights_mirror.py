"""Keeps the weights' copy in main memory equal to the device: by checksums of spans, and from snapshots."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..contracts import Device, SnapshotStore
from ..errors import SnapshotUnusable
from ..observability.error_classification import is_out_of_device_memory
from ..progress import Progress, current
from ..sentences import Sentence
from .checksum import fingerprints, hash_of
from .copying import SpanCopier
from .mirror import HostMirror
from .mirror_layout import MirrorLayout, MirrorSpan, lay_out
from .pinning import BackgroundPinning
from .storages import ManagedStorage

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class WeightsMirror:
    """A copy of movable storages in main memory, which `update` makes at the first offload.

    ``moving`` is the lock of the weights' moves: callers of all methods but `load` and `pin_in_background` hold it, and
    the background pinning takes it for each group of pages.
    """

    def __init__(self, device: Device, moving: threading.Lock) -> None:
        self._device = device
        self._moving = moving
        self.layout = MirrorLayout((), (0,), 0)
        self._mirror: HostMirror | None = None
        #: Of each span, as last copied; None where the copy is not to be trusted.
        self._checksums: list[int | None] = []
        #: Hashes of the spans in the snapshot; None if nothing was saved.
        self.saved: list[int] | None = None
        self.pinning: BackgroundPinning | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of main memory in use."""
        return self.layout.nbytes if self._mirror else 0

    @property
    def memory(self) -> HostMirror:
        """The copy itself, which exists whenever the weights are away from the device."""
        assert self._mirror is not None, "weights that are away have a mirror"
        return self._mirror

    def update(self, storages: Sequence[ManagedStorage]) -> None:
        """Copies every span that has changed on the device since the last copy; makes the mirror if there is none."""
        if self._mirror is None:
            self._make(storages)
        if any(managed.constant is not None and managed.find_constant() != managed.constant for managed in storages):
            # Something was written into a storage that had one value: it needs room in the mirror now.
            self.drop()
            self._make(storages)
        mirror, progress = self.memory, current()
        spans, copier = self.layout.spans, SpanCopier(storages, self.layout)
        if spans:
            progress.enter("checking", self.layout.nbytes)
        now, known = _checksums(copier, spans, progress), self._checksums
        changed = [index for index, number in enumerate(now) if number is None or number != known[index]]
        if changed:
            progress.enter("copying", sum(spans[index].nbytes for index in changed))
        for index in changed:
            known[index] = None  # until the copy is whole
            copier.to_host(spans[index], mirror.span(spans[index]), put_together=now[index] is not None)
            known[index] = now[index]
            progress.advance(spans[index].nbytes)

    def pin_in_background(self) -> None:
        """Begins to lock the mirror's pages, once."""
        if self.pinning is None:
            self.pinning = BackgroundPinning(self.memory, self._device, self._moving)

    def drop(self) -> BackgroundPinning | None:
        """Frees the copy. Returns the stopped pinning, if any, to be joined after ``moving`` has been released."""
        pinning, self.pinning = self.pinning, None
        if pinning is not None:
            pinning.stop()
        if self._mirror is not None:
            self._mirror.unpin()
            self._mirror = None
        return pinning

    def save(self, store: SnapshotStore, name: str) -> None:
        """Writes the copy to a snapshot; `load` checks what it reads against the hashes kept here."""
        hashes = [hash_of(self.memory.span(span)) for span in self.layout.spans]
        if hashes:
            store.write(name, self.ranges(), hashes, self.memory.raw)
        self.saved = hashes

    def load(self, store: SnapshotStore, name: str, once: bool) -> None:
        """Reads the copy from its snapshot, into new memory. `SnapshotUnusable` if there is none or it has changed."""
        if self.saved is None:
            raise SnapshotUnusable(name, Sentence("nothing was saved", "没有保存任何内容"))
        mirror = HostMirror(self.layout, self._moving)
        if self.saved:
            store.read(name, self.ranges(), self.saved, mirror.raw, once=once)
        self._mirror, self.saved = mirror, None

    def ranges(self) -> list[tuple[int, int]]:
        """First byte and end of each span in the copy."""
        return [(span.start, span.stop) for span in self.layout.spans]

    def _make(self, storages: Sequence[ManagedStorage]) -> None:
        for managed in storages:
            managed.constant = managed.find_constant()
        self.layout = lay_out([0 if managed.constant is not None else managed.nbytes for managed in storages])
        self._mirror = HostMirror(self.layout, self._moving)
        self._checksums = [None] * len(self.layout.spans)


def _checksums(copier: SpanCopier, spans: Sequence[MirrorSpan], progress: Progress) -> Sequence[int | None]:
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
