"""Main memory in the shape of a layout, given back to the system at once."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from gpu_manager import SimulatedDevice
from residency.residents.layout import PAGE_BYTES, lay_out
from residency.residents.mirror import HostMirror


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_spans_are_windows_of_one_buffer() -> None:
    layout = lay_out([100, 50, 3000, 1], span_bytes=512, group_bytes=1024)
    mirror = HostMirror(layout)
    for number, span in enumerate(layout.spans):
        assert mirror.span(span).shape == (span.nbytes,)
        mirror.span(span).fill_(number + 1)
    for number, span in enumerate(layout.spans):
        assert (mirror.raw[span.start : span.stop] == number + 1).all()
    assert len(mirror.raw) == layout.nbytes


def test_groups_begin_on_pages_and_cover_everything_once() -> None:
    layout = lay_out([3000] * 10, span_bytes=512, group_bytes=5000)
    mirror = HostMirror(layout)
    groups = mirror.groups()
    assert len(groups) > 1
    assert all(group.data_ptr() % PAGE_BYTES == 0 for group in groups)
    assert sum(map(len, groups)) == layout.nbytes
    assert groups[0].data_ptr() == mirror.raw.data_ptr()


def test_pinning_is_counted_and_undone(device: SimulatedDevice) -> None:
    mirror = HostMirror(lay_out([3000] * 10, span_bytes=512, group_bytes=5000))
    assert all(mirror.pin(group, device) for group in mirror.groups())
    assert mirror.pinned_bytes == device.pinned_bytes == len(mirror.raw)
    mirror.unpin()
    mirror.unpin()
    assert mirror.pinned_bytes == device.pinned_bytes == 0
    assert not mirror.pin(mirror.groups()[0], device)


def test_a_group_that_is_refused_is_not_unpinned_later() -> None:
    device = SimulatedDevice(1 << 20, pinned_limit_bytes=9000)
    mirror = HostMirror(lay_out([3000] * 10, span_bytes=512, group_bytes=5000))
    answers = [mirror.pin(group, device) for group in mirror.groups()]
    assert answers[0]
    assert not all(answers)
    mirror.unpin()
    assert device.pinned_bytes == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see the memory of this process")
def test_memory_goes_back_to_the_system_when_the_mirror_is_dropped() -> None:
    size = 64 << 20
    before = resident_bytes()
    mirror = HostMirror(lay_out([size]))
    assert resident_bytes() - before < size // 8, "nothing is taken before it is written"
    mirror.raw.fill_(1)
    assert resident_bytes() - before > size * 0.9
    del mirror
    gc.collect()
    assert resident_bytes() - before < size // 8


def test_an_empty_mirror_is_no_trouble() -> None:
    mirror = HostMirror(lay_out([]))
    assert sum(map(len, mirror.groups())) == 0
    assert isinstance(mirror.raw, torch.Tensor)
