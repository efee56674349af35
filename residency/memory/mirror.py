"""The copy of an engine's weights in main memory, and the page-locking of it."""

from __future__ import annotations

import atexit
import mmap
import os
import threading
import weakref
from typing import TYPE_CHECKING

from ..contracts import Device
from ..locks import renewed_in_children
from .mirror_layout import MirrorLayout, MirrorSpan

if TYPE_CHECKING:
    import torch

_EXIT_WITHIN_S = 5.0

_alive: weakref.WeakSet[HostMirror] = weakref.WeakSet()


class HostMirror:
    """Main memory with a given layout, in one mapping: freed, all of it returns to the system.

    ``raw`` is uint8 [layout.nbytes]. `pin` locks it group by group; unpinned memory works too, only slower. Pinned
    pages are unpinned before they are unmapped, also by garbage collection and at the interpreter's exit: otherwise the
    driver would refuse to pin them for their next owner.

    ``moving`` is locked while pages are pinned, unpinned or copied; the interpreter's exit waits for it, for seconds at
    most.
    """

    def __init__(self, layout: MirrorLayout, moving: threading.Lock | None = None) -> None:
        import torch

        self._layout = layout
        # A separate mapping: page-aligned, and unlike malloc's memory not cached after its release.
        self._mapping = mmap.mmap(-1, max(layout.nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.raw: torch.Tensor = torch.frombuffer(self._mapping, dtype=torch.uint8, count=layout.nbytes or 1)
        self._moving = moving or renewed_in_children(threading.Lock())
        self._registrations = _Registrations()
        # Not at exit, when moves may be under way: see `_unpin_all`.
        weakref.finalize(self, self._registrations.undo).atexit = False
        _alive.add(self)

    def span(self, span: MirrorSpan) -> torch.Tensor:
        """Returns the bytes of a span, uint8 [span.nbytes]."""
        return self.raw[span.start : span.stop]

    def read(self, managed: int, target: torch.Tensor) -> None:
        """Copies all bytes of one storage, by its number in the layout, to ``target``, uint8 [its size]."""
        import torch

        for span in self._layout.spans:
            sources = torch.split(self.span(span), [part.stop - part.start for part in span.parts])
            for part, source in zip(span.parts, sources, strict=True):
                if part.index == managed:
                    target[part.start : part.stop].copy_(source)

    @property
    def pinned_bytes(self) -> int:
        return sum(len(group) for _, group in self._registrations.groups)

    def groups(self) -> list[torch.Tensor]:
        """Returns the parts that can be pinned one by one; each span is in one of them."""
        stops = (*self._layout.group_starts[1:], self._layout.nbytes)
        pairs = zip(self._layout.group_starts, stops, strict=True)
        return [self.raw[start:stop] for start, stop in pairs if start < stop]

    def pin(self, group: torch.Tensor, device: Device) -> bool:
        """Locks a group's pages for fast copies; False if the system or the device refuses, or after `unpin`."""
        if self._registrations.undone or not device.pin(group):
            return False
        self._registrations.groups.append((device, group))
        return True

    def unpin(self) -> None:
        """Unlocks all pages permanently."""
        self._registrations.undo()

    def unpin_at_exit(self) -> None:
        """Like `unpin`, unless a copy does not end in time; then the process ends with its pages locked."""
        if self._moving.acquire(timeout=_EXIT_WITHIN_S):
            try:
                self.unpin()
            finally:
                self._moving.release()


class _Registrations:
    """The pinned parts of one mapping; keeps it alive until they are unpinned."""

    def __init__(self) -> None:
        self.groups: list[tuple[Device, torch.Tensor]] = []
        self.undone = False
        self._pid = os.getpid()

    def undo(self) -> None:
        self.undone = True
        while self.groups:
            device, group = self.groups.pop()
            if os.getpid() == self._pid:  # a forked child inherits the list, but not the registrations
                device.unpin(group)


@atexit.register
def _unpin_all() -> None:
    for mirror in list(_alive):
        mirror.unpin_at_exit()
