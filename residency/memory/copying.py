"""Copies spans between main memory and a device, where the storages of a span are not adjacent."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from ..observability.error_classification import is_out_of_device_memory
from .mirror_layout import MirrorLayout, MirrorSpan
from .storages import ManagedStorage

if TYPE_CHECKING:
    import torch


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
        for on_device, on_host in self._parts(span, target):
            on_host.copy_(on_device)

    def to_device(self, span: MirrorSpan, source: torch.Tensor) -> None:
        """Copies a span to its storages, on the current stream; with scratch space only if it is available."""
        import torch

        if len(span.parts) > 1 and not self._untouched:
            parts = self._on_device(span)
            try:
                arrived = source.to(parts[0].device, non_blocking=True)
            except RuntimeError as error:
                if not is_out_of_device_memory(error):
                    raise
            else:
                sizes = [part.stop - part.start for part in span.parts]
                if arrived.is_cpu:
                    torch.split_with_sizes_copy(arrived, sizes, out=parts)  # a third of the time of the call below
                else:
                    torch._foreach_copy_(parts, torch.split(arrived, sizes))
                return
        for part, (on_device, on_host) in zip(span.parts, self._parts(span, source), strict=True):
            if self._storages[part.index] not in self._untouched:
                on_device.copy_(on_host, non_blocking=True)

    def _on_device(self, span: MirrorSpan) -> list[torch.Tensor]:
        parts = []
        for part in span.parts:
            managed = self._storages[part.index]
            whole = part.stop - part.start == managed.nbytes  # saves a view: a microsecond for each tensor
            parts.append(managed.byte_view if whole else managed.byte_view[part.start : part.stop])
        return parts

    def _parts(self, span: MirrorSpan, host: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields each part of a span: its bytes on the device, and their place in ``host``, uint8 [span.nbytes]."""
        at = 0
        for part in span.parts:
            nbytes = part.stop - part.start
            yield self._storages[part.index].byte_view[part.start : part.stop], host[at : at + nbytes]
            at += nbytes
