"""No failure on disk or in a thread, and no signal, loses data in memory or leaves a partial file."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_strategies import bytes_of
from snapshot_files import RANGES, Content, listing, refused

from gpu_manager import SimulatedDevice
from residency.errors import SnapshotUnusable
from residency.memory import snapshot
from residency.memory.snapshot import SnapshotFolder
from residency.memory.weights import Weights
from residency.memory.weights_mirror import WeightsMirror


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_full_disk_refuses_and_nothing_is_left_on_it(tiny_disk: Path, device: SimulatedDevice) -> None:
    store = SnapshotFolder(tiny_disk)
    tensor = torch.randn(1 << 19)
    before = bytes_of(tensor)
    weights = Weights({"t": tensor}, device)
    with pytest.raises(SnapshotUnusable, match="No space"):
        weights.save(store, "tts")
    assert listing(store) == []
    assert os.statvfs(tiny_disk).f_bfree == os.statvfs(tiny_disk).f_blocks
    assert weights.host_bytes == 2 << 20, "the copy in main memory stays"
    weights.restore()
    assert bytes_of(tensor) == before


def test_a_disk_that_fills_up_half_way_refuses(
    folder: SnapshotFolder, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "open", _opening(room=7000), raising=False)
    with pytest.raises(SnapshotUnusable, match="No space"):
        content.write(folder)
    monkeypatch.undo()
    assert listing(folder) == []


def test_short_writes_are_continued(folder: SnapshotFolder, content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "open", _opening(most=333), raising=False)
    content.write(folder)
    monkeypatch.undo()
    assert content.read(folder)


def _opening(**limits: int) -> Any:
    def opening(*arguments: Any, **keywords: Any) -> Any:
        return _Disk(open(*arguments, **keywords), **limits)

    return opening


class _Disk:
    """A file with a limit of bytes per write, and of bytes in total."""

    def __init__(self, file: Any, most: int = 1 << 30, room: int = 1 << 30) -> None:
        self._file, self._most, self._room = file, most, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Disk:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: memoryview) -> int:
        count = min(len(data), self._most, self._room)
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._room -= count
        return int(self._file.write(data[:count]))


def test_short_reads_are_continued(folder: SnapshotFolder, content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    content.write(folder)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, into, at: preadv(handle, [into[0][:77]], at))
    assert content.read(folder)


def test_a_file_that_ends_while_it_is_read_is_refused(
    folder: SnapshotFolder, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    content.write(folder)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, into, at: preadv(handle, into, at) if at < 8000 else 0)
    assert "damaged" in refused(folder, content)


def test_a_disk_that_cannot_be_read_is_refused_and_the_file_stays(
    folder: SnapshotFolder, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = content.write(folder)

    def fails(*_: object, **keywords: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    assert "Input/output error" in refused(folder, content)
    assert path.exists(), "it may be whole when the disk is well again"


def test_signals_do_not_cut_a_write_or_a_read_short(tmp_path: Path) -> None:
    """Real EINTR: a separate process with a repeating timer."""
    script = f"""
import signal, sys, torch
sys.path[:0] = {[str(Path(__file__).parents[2])]!r}
from residency.memory.checksum import host_checksum
from residency.memory.snapshot import SnapshotFolder
rings = []
signal.signal(signal.SIGALRM, lambda *_: rings.append(1))
signal.siginterrupt(signal.SIGALRM, True)
raw = torch.randint(0, 256, (32 << 20,), dtype=torch.uint8)
ranges = [(start, start + (8 << 20)) for start in range(0, 32 << 20, 8 << 20)]
hashes = [host_checksum(raw[start:stop]) for start, stop in ranges]
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
for turn in range(3):
    folder = SnapshotFolder({str(tmp_path)!r})
    folder.write(str(turn), ranges, hashes, raw)
    target = torch.zeros_like(raw)
    folder.read(str(turn), ranges, hashes, target)
    assert torch.equal(raw, target)
signal.setitimer(signal.ITIMER_REAL, 0)
assert rings
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("failing", [0, 3])
def test_an_error_of_any_kind_in_a_reading_thread_is_no_success(
    folder: SnapshotFolder, content: Content, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    content.write(folder)
    read_range = snapshot._read_range

    def fails_once(handle: int, offset: int, target: memoryview, start: int) -> int:
        if start == RANGES[failing][0]:
            raise MemoryError
        return read_range(handle, offset, target, start)

    monkeypatch.setattr(snapshot, "_read_range", fails_once)
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    with pytest.raises((MemoryError, SnapshotUnusable)):
        content.read(folder)


def test_a_machine_with_no_thread_to_spare_reads_all_the_same(
    folder: SnapshotFolder, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    content.write(folder)

    def none_left(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    assert content.read(folder)


def test_the_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_memory_is_dropped(
    folder: SnapshotFolder, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def record(module: Any, name: str, text: Any) -> None:
        function = getattr(module, name)

        def recording(*arguments: Any) -> Any:
            calls.append(text(*arguments))
            return function(*arguments)

        monkeypatch.setattr(module, name, recording)

    record(os, "fsync", lambda handle: f"fsync {Path(os.readlink(f'/proc/self/fd/{handle}')).suffix or 'folder'}")
    record(os, "replace", lambda source, target: f"rename {Path(source).suffix} to {Path(target).suffix}")
    record(WeightsMirror, "drop", lambda self: "drop")
    Weights({"t": torch.randn(100)}, device).save(folder, "tts")
    assert calls == ["fsync .tmp", "rename .tmp to .safetensors", "fsync folder", "drop"]


@pytest.mark.parametrize("step", ["fsync", "replace", "utime"])
def test_whatever_fails_while_writing_leaves_no_half_file_and_all_of_memory(
    folder: SnapshotFolder, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fails(*_: object, **keywords: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    tensor = torch.randn(100)
    before = bytes_of(tensor)
    weights = Weights({"t": tensor}, device)
    monkeypatch.setattr(os, step, fails)
    with pytest.raises(SnapshotUnusable, match="Input/output"):
        weights.save(folder, "tts")
    monkeypatch.undo()
    assert not [name for name in listing(folder) if name.endswith(".tmp")]
    assert (weights.device_bytes, weights.host_bytes) == (0, 400)
    weights.restore()
    assert bytes_of(tensor) == before
