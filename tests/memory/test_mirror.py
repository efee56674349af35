"""A mirror's memory has the given layout and returns to the system at once."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from gpu_manager import SimulatedDevice
from residency.memory.mirror import PAGE_BYTES, HostMirror, lay_out
from residency.memory.weights import Weights


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


class Driver(SimulatedDevice):
    """Records registrations, and whether the memory is still mapped when they end."""

    def __init__(self) -> None:
        super().__init__(1 << 30)
        self.registered: dict[int, int] = {}
        self.read: list[int] = []

    def pin(self, raw: torch.Tensor) -> bool:
        self.registered[raw.data_ptr()] = len(raw)
        return super().pin(raw)

    def unpin(self, raw: torch.Tensor) -> None:
        del self.registered[raw.data_ptr()]
        self.read.append(int(raw.sum()))
        super().unpin(raw)


def pinned_mirror(device: SimulatedDevice, moving: threading.Lock | None = None) -> HostMirror:
    mirror = HostMirror(lay_out([3000] * 10, span_bytes=512, group_bytes=5000), moving)
    mirror.raw.fill_(1)
    assert all(mirror.pin(group, device) for group in mirror.groups())
    return mirror


def test_a_mirror_that_is_only_forgotten_is_unpinned_while_it_is_mapped() -> None:
    device = Driver()
    mirror = pinned_mirror(device)
    sizes = [len(group) for group in mirror.groups()]
    del mirror
    gc.collect()
    assert device.registered == {}
    assert sorted(device.read) == sorted(sizes)
    assert device.pinned_bytes == 0


def test_an_engine_that_is_dropped_without_a_release_leaves_no_page_pinned() -> None:
    device = Driver()
    weights = Weights({"t": torch.randn(100_000)}, device)
    weights.offload()
    assert weights.mirror.pinning is not None
    weights.mirror.pinning.join()
    assert device.registered
    del weights
    gc.collect()
    assert device.registered == {}


EXIT = """
import atexit, os, sys, threading
sys.path[:0] = {folders!r}
atexit.register(lambda: print(len(device.registered)))  # registered first, called last
from test_mirror import Driver, pinned_mirror
from residency.memory import mirror as module
device, moving = Driver(), threading.Lock()
mirror = pinned_mirror(device, moving)
"""
FORK = """
child = os.fork()
if not child:
    mirror.unpin()
    print(len(device.registered), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.parametrize(
    ("script", "said"),
    [("", "0\n"), ("module._EXIT_WITHIN_S = 0.01; moving.acquire()", "6\n"), (FORK, "6\n0\n")],
    ids=["at rest", "under a copy that does not end", "not in a forked child"],
)
def test_pages_are_unpinned_when_the_interpreter_ends(script: str, said: str) -> None:
    here = Path(__file__).parent
    code = EXIT.format(folders=[str(here.parents[1]), str(here)]) + script
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == said


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
