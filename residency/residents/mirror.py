"""The one copy of an engine's bytes in main memory."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from ..contracts import Device
from .layout import Layout, Span

if TYPE_CHECKING:
    import torch


class HostMirror:
    """Main memory in the shape of a layout: one mapping, so that all of it goes back to the system when dropped.

    ``raw`` is uint8 [layout.nbytes]. Pinned group by group with `pin`; unpinned memory works too, only slower.
    """

    def __init__(self, layout: Layout) -> None:
        import torch

        self._layout = layout
        # A mapping of its own: page-aligned, and unlike malloc's memory not kept back for later.
        self._mapping = mmap.mmap(-1, max(layout.nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.raw: torch.Tensor = torch.frombuffer(self._mapping, dtype=torch.uint8, count=layout.nbytes or 1)
        self._pinned: list[torch.Tensor] = []

    def span(self, span: Span) -> torch.Tensor:
        """The bytes of a span, uint8 [span.nbytes]."""
        return self.raw[span.start : span.stop]

    def read(self, piece: int, target: torch.Tensor) -> None:
        """Copy all bytes of one piece, by its number in the layout, to ``target``, uint8 [its size]."""
        import torch

        for span in self._layout.spans:
            sources = torch.split(self.span(span), [part.stop - part.start for part in span.parts])
            for part, source in zip(span.parts, sources, strict=True):
                if part.piece == piece:
                    target[part.start : part.stop].copy_(source)

    @property
    def pinned_bytes(self) -> int:
        return sum(len(group) for group in self._pinned)

    def groups(self) -> list[torch.Tensor]:
        """The parts that can be pinned one by one; no span lies in two of them."""
        stops = (*self._layout.group_starts[1:], self._layout.nbytes)
        pairs = zip(self._layout.group_starts, stops, strict=True)
        return [self.raw[start:stop] for start, stop in pairs if start < stop]

    def pin(self, group: torch.Tensor, device: Device) -> bool:
        """Lock a group's pages for fast copies; False if the system or the device will not."""
        if not device.pin(group):
            return False
        self._pinned.append(group)
        return True

    def unpin(self, device: Device) -> None:
        while self._pinned:
            device.unpin(self._pinned.pop())
