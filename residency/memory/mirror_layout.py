"""Positions of storages in the host mirror, and spans for copies, comparisons and snapshots. Pure."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

SPAN_BYTES = 8 << 20
"""Largest span: short to transfer, but much longer than the transfer's start; its scratch space fits in the cache."""

GROUP_BYTES = 256 << 20
"""Minimal group size. Groups start on a page boundary, so that host memory can be pinned group by group."""

PAGE_BYTES = 4096


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
    def nbytes(self) -> int:
        return sum([part.stop - part.start for part in self.parts])

    @property
    def stop(self) -> int:
        return self.start + self.nbytes


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
    small: list[StorageRange] = []
    small_bytes = 0

    def close_span(parts: Sequence[StorageRange]) -> None:
        nonlocal offset
        if offset - group_starts[-1] >= group_bytes:
            offset = -(-offset // PAGE_BYTES) * PAGE_BYTES
            group_starts.append(offset)
        span = MirrorSpan(offset, tuple(parts))
        spans.append(span)
        offset = span.stop

    def flush() -> None:
        nonlocal small_bytes
        if small:
            close_span(small)
            small.clear()
            small_bytes = 0

    for number, size in enumerate(sizes):
        if not size:
            continue
        if small_bytes + size > span_bytes:
            flush()
        if size >= span_bytes // 8:
            flush()
            for start in range(0, size, span_bytes):
                close_span([StorageRange(number, start, min(start + span_bytes, size))])
        else:
            small.append(StorageRange(number, 0, size))
            small_bytes += size
    flush()
    return MirrorLayout(tuple(spans), tuple(group_starts), offset)
