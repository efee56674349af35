"""The copy of an engine's weights in main memory: its layout, its pages, and the thread that pins them.

Storages have consecutive positions in the mirror. A *span* is the unit of copies, comparisons and snapshots: some
consecutive bytes of the mirror. A *group* of spans is the unit of pinning (page-locking), which is slow, and makes
copies fast.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import mmap
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..contracts import Device
from ..locks import renewed_in_children
from ..shared_file import SharedFile

if TYPE_CHECKING:
    import torch

SPAN_BYTES = 8 << 20
"""Largest span: short to transfer, but much longer than the transfer's start; its scratch space fits in the cache."""

GROUP_BYTES = 256 << 20
"""Minimal group size. Groups start on a page boundary, so that host memory can be pinned group by group."""

PAGE_BYTES = 4096

_EXIT_WITHIN_S = 5.0

_alive: weakref.WeakSet[HostMirror] = weakref.WeakSet()
_running: weakref.WeakSet[BackgroundPinning] = weakref.WeakSet()


@dataclass(frozen=True)
class StorageRange:
    """Bytes ``start`` to ``stop`` of storage number ``index``."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class MirrorSpan:
    """Consecutive bytes of the mirror: a part of one large storage, or several whole small storages."""

    start: int
    parts: tuple[StorageRange, ...]

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Bytes of each part."""
        return [part.stop - part.start for part in self.parts]

    @functools.cached_property
    def nbytes(self) -> int:
        return sum(self.sizes)

    @property
    def stop(self) -> int:
        return self.start + self.nbytes

    def split(self, raw: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the bytes of each part, as views of those of the span, uint8 [nbytes]."""
        import torch

        return torch.split(raw, self.sizes)


@dataclass(frozen=True)
class MirrorLayout:
    """The spans in order, the start of each pinnable group, and the mirror's size."""

    spans: tuple[MirrorSpan, ...]
    group_starts: tuple[int, ...]
    nbytes: int


def lay_out(sizes: Sequence[int], span_bytes: int = SPAN_BYTES, group_bytes: int = GROUP_BYTES) -> MirrorLayout:
    """Places storages of these sizes (bytes; 0: not in the mirror) one after the other."""
    spans: list[MirrorSpan] = []
    group_starts = [0]
    offset = 0
    for parts in _parts_of_spans(sizes, span_bytes):
        if offset - group_starts[-1] >= group_bytes:
            offset = -(-offset // PAGE_BYTES) * PAGE_BYTES
            group_starts.append(offset)
        spans.append(MirrorSpan(offset, parts))
        offset = spans[-1].stop
    return MirrorLayout(tuple(spans), tuple(group_starts), offset)


def _parts_of_spans(sizes: Sequence[int], span_bytes: int) -> Iterator[tuple[StorageRange, ...]]:
    small: list[StorageRange] = []
    small_bytes = 0
    for number, size in enumerate(sizes):
        if not size:
            continue
        is_large = size >= span_bytes // 8
        if small and (is_large or small_bytes + size > span_bytes):
            yield tuple(small)
            small, small_bytes = [], 0
        if is_large:
            for start in range(0, size, span_bytes):
                yield (StorageRange(number, start, min(start + span_bytes, size)),)
        else:
            small.append(StorageRange(number, 0, size))
            small_bytes += size
    if small:
        yield tuple(small)


class HostMirror:
    """Main memory with a given layout, in one mapping: freed, all of it returns to the system.

    With ``shared`` it is a ``file`` that other processes may get, or ordinary memory if the system has no room for one.
    ``raw`` is uint8 [layout.nbytes]. `pin` locks it group by group; unpinned memory works too, only slower. Pinned
    pages are unpinned before they are unmapped, also by garbage collection and at the interpreter's exit: otherwise the
    driver would refuse to pin them for their next owner.

    ``moving`` is locked while pages are pinned, unpinned or copied; the interpreter's exit waits for it, for seconds at
    most.
    """

    def __init__(self, layout: MirrorLayout, moving: threading.Lock | None = None, shared: bool = False) -> None:
        import torch

        self._layout = layout
        # A separate mapping: page-aligned, and unlike malloc's memory not cached after its release.
        nbytes = max(layout.nbytes, 1)
        self.file: SharedFile | None = None
        if shared:
            with contextlib.suppress(OSError):
                self.file = SharedFile.create(nbytes)
        self._mapping = (
            self.file.mapped(shared=True) if self.file else mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        )
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.raw: torch.Tensor = torch.frombuffer(self._mapping, dtype=torch.uint8, count=layout.nbytes or 1)
        self.moving = moving or renewed_in_children(threading.Lock())
        self._can_be_pinned = True
        self._pinned: list[tuple[Device, torch.Tensor]] = []
        self._pid = os.getpid()
        # Keeps the mapping alive until it is unpinned. Not at exit, when moves may be under way: see `_unpin_all`.
        weakref.finalize(self, _unpin, self._pinned, self._pid).atexit = False
        _alive.add(self)

    def span(self, span: MirrorSpan) -> torch.Tensor:
        """Returns the bytes of a span, uint8 [span.nbytes]."""
        return self.raw[span.start : span.stop]

    def read(self, managed: int, target: torch.Tensor) -> None:
        """Copies all bytes of one storage, by its number in the layout, to ``target``, uint8 [its size]."""
        for span in self._layout.spans:
            for part, source in zip(span.parts, span.split(self.span(span)), strict=True):
                if part.index == managed:
                    target[part.start : part.stop].copy_(source)

    @property
    def pinned_bytes(self) -> int:
        return sum(len(group) for _, group in self._pinned)

    def groups(self) -> list[torch.Tensor]:
        """Returns the parts that can be pinned one by one; each span is in one of them."""
        stops = (*self._layout.group_starts[1:], self._layout.nbytes)
        pairs = zip(self._layout.group_starts, stops, strict=True)
        return [self.raw[start:stop] for start, stop in pairs if start < stop]

    def pin(self, group: torch.Tensor, device: Device) -> bool:
        """Locks a group's pages for fast copies; False if the system or the device refuses, or after `unpin`."""
        if not self._can_be_pinned or not device.pin(group):
            return False
        self._pinned.append((device, group))
        return True

    def unpin(self) -> None:
        """Unlocks all pages permanently."""
        self._can_be_pinned = False
        _unpin(self._pinned, self._pid)


def _unpin(pinned: list[tuple[Device, torch.Tensor]], pid: int) -> None:
    while pinned:
        device, group = pinned.pop()
        if os.getpid() == pid:  # a forked child inherits the list, but not the registrations
            device.unpin(group)


class BackgroundPinning(threading.Thread):
    """Pins a mirror's groups one by one until done, stopped, or refused (the rest stays pageable, only slower).

    ``moving`` is locked while a group is pinned, and during moves of the mirror's bytes: a move waits for one group at
    most, and no page is locked during a copy. Never `join` with ``moving`` held. Does not keep the mirror alive.
    """

    def __init__(self, mirror: HostMirror, device: Device, moving: threading.Lock) -> None:
        super().__init__(name="gpu-pinning", daemon=True)
        self._mirror = weakref.ref(mirror)
        self._device = device
        self._moving = moving
        self._stop_requested = threading.Event()
        _running.add(self)
        self.start()

    def stop(self) -> None:
        """Stops before the next group. If the caller holds ``moving``, none is being pinned."""
        self._stop_requested.set()

    def run(self) -> None:
        number = 0
        while self._pin(number):
            number += 1

    def _pin(self, number: int) -> bool:
        """Pins a group; returns False if there is no mirror or no such group, or if that is refused."""
        with self._moving:
            mirror = None if self._stop_requested.is_set() else self._mirror()
            groups = [] if mirror is None else mirror.groups()
            return mirror is not None and number < len(groups) and mirror.pin(groups[number], self._device)


@atexit.register
def _unpin_all() -> None:
    for pinning in list(_running):  # a thread inside torch at the interpreter's end would end the process with an error
        pinning.stop()
        if pinning.ident is not None:  # otherwise it is not running yet
            pinning.join()
    for mirror in list(_alive):
        if mirror.moving.acquire(timeout=_EXIT_WITHIN_S):  # else a copy does not end: the pages stay locked
            mirror.unpin()
            mirror.moving.release()
