"""Copies weights between a device and their mirror in main memory; finds changed ones by checksums of spans."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from ..contracts import Device
from ..errors import SnapshotUnusable
from ..observability.error_classification import is_out_of_device_memory
from ..progress import Progress, current
from ..sentences import Sentence
from .checksum import checksums, host_checksum
from .mirror import BackgroundPinning, HostMirror, MirrorLayout, MirrorSpan, lay_out
from .snapshot import SnapshotFolder
from .storages import ManagedStorage

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class SpanCopier:
    """Copies of one layout's spans during one move. Small storages are transferred together if scratch space allows.

    In main memory a span is uint8 [span.nbytes]. Storages in ``untouched`` are not written.
    """

    def __init__(
        self, storages: Sequence[ManagedStorage], layout: MirrorLayout, untouched: Collection[ManagedStorage] = ()
    ) -> None:
        self._storages = storages
        self._layout = layout
        self._untouched = untouched
        self._scratch: torch.Tensor | None = None

    def untyped_storages(self, span: MirrorSpan) -> list[torch.UntypedStorage]:
        """Returns the storages that `to_device` writes for a span."""
        storages = [self._storages[part.index] for part in span.parts]
        return [managed.storage for managed in storages if not self._untouched or managed not in self._untouched]

    def gathered(self, span: MirrorSpan) -> torch.Tensor:
        """Returns the bytes of a span on the device as one tensor; valid until the next call.

        Several storages are concatenated in scratch space of the size of the largest span.
        """
        import torch

        parts = self._on_device(span)
        if len(parts) == 1:
            return parts[0]
        if self._scratch is None:
            largest = max(span.nbytes for span in self._layout.spans)
            self._scratch = torch.empty(largest, dtype=torch.uint8, device=parts[0].device)
        return torch.cat(parts, out=self._scratch[: span.nbytes])

    def to_host(self, span: MirrorSpan, target: torch.Tensor, put_together: bool) -> None:
        """Copies a span from the device; if ``put_together``, joins its storages there first, in scratch space."""
        if put_together:
            target.copy_(self.gathered(span))
            return
        for on_device, on_host in zip(self._on_device(span), span.split(target), strict=True):
            on_host.copy_(on_device)

    def to_device(self, span: MirrorSpan, source: torch.Tensor) -> None:
        """Copies a span to its storages, on the current stream; with scratch space only if it is available."""
        import torch

        parts = self._on_device(span)
        if len(parts) > 1 and not self._untouched:
            try:
                arrived = source.to(parts[0].device, non_blocking=True)
            except RuntimeError as error:
                if not is_out_of_device_memory(error):
                    raise
            else:
                if arrived.is_cpu:  # a third of the time of the call below
                    torch.split_with_sizes_copy(arrived, span.sizes, out=parts)
                else:
                    torch._foreach_copy_(parts, span.split(arrived))
                return
        for part, on_device, on_host in zip(span.parts, parts, span.split(source), strict=True):
            if self._storages[part.index] not in self._untouched:
                on_device.copy_(on_host, non_blocking=True)

    def _on_device(self, span: MirrorSpan) -> list[torch.Tensor]:
        parts = []
        for part in span.parts:
            managed = self._storages[part.index]
            whole = part.stop - part.start == managed.nbytes  # saves a view: a microsecond for each tensor
            parts.append(managed.byte_view if whole else managed.byte_view[part.start : part.stop])
        return parts


class WeightsMirror:
    """A copy of movable storages in main memory, which `update` makes at the first offload.

    ``moving`` is the lock of the weights' moves. Callers of all methods but `load` and `pin_in_background` hold it;
    pinning in the background takes it for each group of pages.
    """

    def __init__(self, device: Device, moving: threading.Lock) -> None:
        self._device = device
        self._moving = moving
        self.layout = MirrorLayout((), (0,), 0)
        self._mirror: HostMirror | None = None
        #: By span, as last copied; None where the copy may be incomplete.
        self._checksums: list[int | None] = []
        #: Checksums of the spans in the snapshot; None if nothing was saved.
        self.saved: list[int] | None = None
        self.pinning: BackgroundPinning | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of main memory in use."""
        return self.layout.nbytes if self._mirror else 0

    @property
    def memory(self) -> HostMirror:
        """The copy itself; exists while the weights are away from the device."""
        assert self._mirror is not None, "weights that are away have a mirror"
        return self._mirror

    def update(self, storages: Sequence[ManagedStorage]) -> None:
        """Copies every span that has changed on the device since the last copy; makes the mirror if there is none."""
        if self._mirror is None:
            self._make(storages)
        if any(managed.constant is not None and managed.find_constant() != managed.constant for managed in storages):
            # A storage that had one value was written to, and needs room in the mirror now.
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
        """Starts to pin the mirror's pages, once."""
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

    def save(self, store: SnapshotFolder, name: str) -> None:
        """Writes the copy to a snapshot; `load` checks what it reads against the checksums kept here."""
        checksums = [host_checksum(self.memory.span(span)) for span in self.layout.spans]
        if checksums:
            store.write(name, self.ranges(), checksums, self.memory.raw)
        self.saved = checksums

    def load(self, store: SnapshotFolder, name: str, once: bool) -> None:
        """Reads the copy from its snapshot into new memory; raises `SnapshotUnusable` if it is missing or damaged."""
        if self.saved is None:
            raise SnapshotUnusable(name, Sentence("nothing was saved", "没有保存任何内容"))
        mirror = HostMirror(self.layout, self._moving)
        if self.saved:
            store.read(name, self.ranges(), self.saved, mirror.raw, once=once)
        self._mirror, self.saved = mirror, None

    def ranges(self) -> list[tuple[int, int]]:
        """Returns the first byte and the end of each span in the copy."""
        return [(span.start, span.stop) for span in self.layout.spans]

    def _make(self, storages: Sequence[ManagedStorage]) -> None:
        for managed in storages:
            managed.constant = managed.find_constant()
        self.layout = lay_out([0 if managed.constant is not None else managed.nbytes for managed in storages])
        self._mirror = HostMirror(self.layout, self._moving)
        self._checksums = [None] * len(self.layout.spans)


def _checksums(copier: SpanCopier, spans: Sequence[MirrorSpan], progress: Progress) -> Sequence[int | None]:
    """Returns the checksum of each span on the device; None for all if the device has no room to compute them."""

    def gathered() -> Iterator[torch.Tensor]:
        for span in spans:
            yield copier.gathered(span)
            progress.advance(span.nbytes)

    try:
        return checksums(gathered(), len(spans))
    except RuntimeError as error:
        if not is_out_of_device_memory(error):
            raise
        logger.info("The device is too full to compare weights there; all of them are copied back")
    return [None] * len(spans)
