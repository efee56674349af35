"""A snapshot is whole and right, or refused; nothing that fails on disk loses anything in memory."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from fakes import Worker
from strategies import bytes_of, small_layout

from gpu_manager import SimulatedDevice
from residency.errors import InvalidInput, SnapshotUnusable
from residency.residents import snapshot
from residency.residents.fingerprint import hash_of
from residency.residents.snapshot import SnapshotFolder
from residency.residents.weights import Weights

RANGES = [(0, 1000), (1000, 1001), (1001, 5000), (5000, 10_000)]


class Content:
    """10,000 bytes in ranges, as weights would write them, and a place to read them into."""

    def __init__(self, seed: int = 0) -> None:
        self.raw = torch.randint(0, 256, (10_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        self.hashes = [hash_of(self.raw[start:stop]) for start, stop in RANGES]
        self.target = torch.zeros_like(self.raw)

    def write(self, folder: SnapshotFolder, name: str = "tts") -> Path:
        before = set(folder.folder.iterdir())
        folder.write(name, RANGES, self.hashes, self.raw)
        new = set(folder.folder.iterdir()) - before
        return new.pop() if new else Path("nothing new")

    def read(self, folder: SnapshotFolder, name: str = "tts") -> bool:
        self.target.zero_()
        folder.read(name, RANGES, self.hashes, self.target)
        return torch.equal(self.target, self.raw)


@pytest.fixture
def folder(tmp_path: Path) -> SnapshotFolder:
    return SnapshotFolder(tmp_path / "snapshots")


@pytest.fixture
def content() -> Content:
    return Content()


def listing(folder: SnapshotFolder) -> list[str]:
    return sorted(path.name for path in folder.folder.iterdir())


def test_what_was_written_is_read_back_by_another_folder_object_too(folder: SnapshotFolder, content: Content) -> None:
    path = content.write(folder)
    assert content.read(folder)
    assert content.read(SnapshotFolder(folder.folder))
    assert listing(folder) == [path.name]
    assert path.name.startswith("tts-")


def test_the_file_opens_with_the_safetensors_library(folder: SnapshotFolder, content: Content) -> None:
    path = content.write(folder)
    with safetensors.safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["mirror"]
        assert torch.equal(file.get_tensor("mirror"), content.raw)
        assert file.metadata() == {"format": "gpu-managed-tts"}
    assert (path.stat().st_size - len(content.raw)) % 4096 == 0, "the data begins on a page"


def test_the_same_content_is_written_once_and_other_content_beside_it(folder: SnapshotFolder) -> None:
    path = Content(1).write(folder)
    written = path.stat().st_ino
    Content(1).write(folder)
    assert (listing(folder), path.stat().st_ino) == ([path.name], written)
    Content(2).write(folder)
    Content(1).write(folder, "asr")
    assert len(listing(folder)) == 3
    assert Content(1).read(folder)
    assert Content(2).read(folder)


@pytest.mark.parametrize("name", ["a/b", "../up", "语音", "." * 3, "x" * 150])
def test_any_name_of_a_model_makes_a_file_in_the_folder(folder: SnapshotFolder, content: Content, name: str) -> None:
    path = content.write(folder, name)
    assert path.parent == folder.folder
    assert content.read(folder, name)


def test_a_name_too_long_for_the_disk_is_refused(folder: SnapshotFolder, content: Content) -> None:
    with pytest.raises(SnapshotUnusable):
        content.write(folder, "x" * 300)
    assert listing(folder) == []


# -- damage -----------------------------------------------------------------------------------------------------


def refused(folder: SnapshotFolder, content: Content) -> str:
    with pytest.raises(SnapshotUnusable) as error:
        content.read(folder)
    return error.value.reason


def test_a_flipped_bit_anywhere_is_noticed(folder: SnapshotFolder, content: Content) -> None:
    path = content.write(folder)
    whole = path.read_bytes()
    edges = [0, 7, 8, 100, 4095, 4096, 5095, 5096, 5097, len(whole) - 1]
    for place in edges + random.Random(0).sample(range(len(whole)), 150):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert str(path) in refused(folder, content), f"byte {place}"
        content.write(folder)  # as the next release does
        assert content.read(folder), "a new one takes the place of the damaged one"
        assert path.read_bytes() == whole


def test_a_damaged_file_is_removed_and_the_place_of_the_damage_is_named(
    folder: SnapshotFolder, content: Content
) -> None:
    path = content.write(folder)
    damaged = bytearray(path.read_bytes())
    damaged[4096 + 7000] ^= 1
    path.write_bytes(damaged)
    assert "damaged at byte 9,096" in refused(folder, content)
    assert not path.exists()


@pytest.mark.parametrize("nbytes", [0, 5, 4096, 4096 + 9999, 4096 + 10_001, 20_000])
def test_a_file_of_another_length_is_refused(folder: SnapshotFolder, content: Content, nbytes: int) -> None:
    path = content.write(folder)
    os.truncate(path, nbytes)
    assert "cut off" in refused(folder, content)
    content.write(folder)
    assert content.read(folder)


def test_a_foreign_file_of_that_name_is_refused(folder: SnapshotFolder, content: Content) -> None:
    path = content.write(folder)
    path.write_bytes(os.urandom(path.stat().st_size))
    assert "not one of ours" in refused(folder, content)


def test_a_snapshot_of_other_content_under_that_name_is_refused(folder: SnapshotFolder, content: Content) -> None:
    other = Content(1).write(folder)
    path = content.write(folder)
    os.replace(other, path)
    assert "damaged" in refused(folder, content)


def test_a_missing_file_is_refused(folder: SnapshotFolder, content: Content) -> None:
    content.write(folder).unlink()
    assert "missing" in refused(folder, content)


def test_a_file_that_cannot_be_opened_is_refused_for_reading_and_for_writing(
    folder: SnapshotFolder, content: Content
) -> None:
    path = content.write(folder)
    path.unlink()
    path.mkdir()  # root may read any file, but not a folder
    assert "directory" in refused(folder, content).lower()
    with pytest.raises(SnapshotUnusable):
        content.write(folder)
    assert listing(folder) == [path.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any file")
def test_a_file_without_permission_is_refused(folder: SnapshotFolder, content: Content) -> None:
    content.write(folder).chmod(0)
    assert "denied" in refused(folder, content)


def test_a_folder_that_has_gone_is_refused_for_reading_and_for_writing(
    folder: SnapshotFolder, content: Content
) -> None:
    content.write(folder).unlink()
    folder.folder.rmdir()
    refused(folder, content)
    with pytest.raises(SnapshotUnusable):
        folder.write("tts", RANGES, content.hashes, content.raw)


def test_a_place_that_cannot_be_a_folder_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="snapshots"):
        SnapshotFolder(tmp_path / "file")


# -- the disk ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for 1 MB."""
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
    monkeypatch.setattr(Path, "open", _opening(room=7000))
    with pytest.raises(SnapshotUnusable, match="No space"):
        content.write(folder)
    monkeypatch.undo()
    assert listing(folder) == []


def test_short_writes_are_continued(folder: SnapshotFolder, content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", _opening(most=333))
    content.write(folder)
    monkeypatch.undo()
    assert content.read(folder)


def _opening(**limits: int) -> Any:
    def opening(path: Path, mode: str, buffering: int = -1) -> Any:
        file = open(path, mode, buffering)  # noqa: SIM115 - its user closes it
        return _Disk(file, **limits) if "w" in mode else file

    return opening


class _Disk:
    """A file that takes at most so many bytes at once, and has room for so many in all."""

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

    def fails(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    assert "Input/output error" in refused(folder, content)
    assert path.exists(), "it may be whole when the disk is well again"


def test_signals_do_not_cut_a_write_or_a_read_short(tmp_path: Path) -> None:
    """EINTR, for real: in a process of its own, under a timer that never stops ringing."""
    script = f"""
import signal, sys, torch
sys.path[:0] = {[str(Path(__file__).parents[2])]!r}
from residency.residents.fingerprint import hash_of
from residency.residents.snapshot import SnapshotFolder
rings = []
signal.signal(signal.SIGALRM, lambda *_: rings.append(1))
signal.siginterrupt(signal.SIGALRM, True)
raw = torch.randint(0, 256, (32 << 20,), dtype=torch.uint8)
ranges = [(start, start + (8 << 20)) for start in range(0, 32 << 20, 8 << 20)]
hashes = [hash_of(raw[start:stop]) for start, stop in ranges]
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
    record(Weights, "_drop_mirror", lambda self: "drop")
    Weights({"t": torch.randn(100)}, device).save(folder, "tts")
    assert calls == ["fsync .tmp", "rename .tmp to .safetensors", "fsync folder", "drop"]


@pytest.mark.parametrize("step", ["fsync", "replace", "utime"])
def test_whatever_fails_while_writing_leaves_no_half_file_and_all_of_memory(
    folder: SnapshotFolder, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fails(*_: object) -> None:
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


# -- the limit --------------------------------------------------------------------------------------------------

FILE_BYTES = 10_000 + 4096


def ages(*paths: Path) -> None:
    """Make these the oldest, in this order."""
    for age, path in enumerate(paths):
        os.utime(path, (1000 + age, 1000 + age))


def test_beyond_the_limit_those_unused_for_longest_are_removed(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path, limit_bytes=3 * FILE_BYTES)
    contents = [Content(seed) for seed in range(4)]
    paths = [content.write(folder) for content in contents[:3]]
    ages(paths[1], paths[0], paths[2])
    assert contents[1].read(folder), "use makes it young again"
    new = contents[3].write(folder)
    assert set(listing(folder)) == {path.name for path in (paths[1], paths[2], new)}


def test_writing_what_is_there_already_counts_as_use(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path, limit_bytes=2 * FILE_BYTES)
    contents = [Content(seed) for seed in range(3)]
    paths = [content.write(folder) for content in contents[:2]]
    ages(*paths)
    contents[0].write(folder)
    new = contents[2].write(folder)
    assert set(listing(folder)) == {paths[0].name, new.name}


def test_the_newest_is_kept_even_if_it_is_larger_than_the_limit(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path, limit_bytes=1)
    Content(1).write(folder)
    new = Content(2).write(folder)
    assert listing(folder) == [new.name]


def test_files_that_are_not_snapshots_are_never_removed(tmp_path: Path) -> None:
    mine = tmp_path / "model-00001-of-00002.safetensors"
    mine.write_bytes(b"x" * 100_000)
    ages(mine)
    folder = SnapshotFolder(tmp_path, limit_bytes=FILE_BYTES)
    paths = [Content(seed).write(folder) for seed in range(2)]
    assert sorted(listing(folder)) == sorted([mine.name, paths[1].name])


def test_another_process_that_removes_a_snapshot_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SnapshotFolder(tmp_path, limit_bytes=FILE_BYTES)
    old = Content(1).write(folder)
    iterdir = Path.iterdir

    def list_then_remove(path: Path) -> list[Path]:
        found = list(iterdir(path))
        old.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "iterdir", list_then_remove)
    folder.write("tts", RANGES, Content(2).hashes, Content(2).raw)
    assert Content(2).read(folder)


# -- other processes --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def a_process_that_writes(path: Path) -> Iterator[None]:
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def test_what_a_dead_process_left_half_written_is_removed_and_that_of_a_living_one_kept(tmp_path: Path) -> None:
    with a_process_that_writes(tmp_path / ".tts-1.safetensors.0123abcd.tmp"):
        for name in (".tts-2.safetensors.0123abcd.tmp", "tts-3.safetensors.0123abcd.tmp", ".x.tmp", "notes.txt"):
            (tmp_path / name).touch()
        folder = SnapshotFolder(tmp_path)
        others = [".x.tmp", "notes.txt", "tts-3.safetensors.0123abcd.tmp"]
        assert listing(folder) == sorted([".tts-1.safetensors.0123abcd.tmp", *others])
    assert listing(SnapshotFolder(tmp_path)) == others


def test_a_second_folder_object_does_not_disturb_a_write_under_way(tmp_path: Path, content: Content) -> None:
    folder = SnapshotFolder(tmp_path)
    fsync = os.fsync

    def fsync_while_another_starts(handle: int) -> None:
        SnapshotFolder(tmp_path)
        fsync(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync_while_another_starts)
        content.write(folder)
    assert content.read(folder)


def test_strange_things_in_the_folder_are_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / ".99999999999999999999999-1-x.tmp").touch()
    (tmp_path / ".tts.safetensors.0123abcd.tmp").mkdir()
    (tmp_path / f"tts-{'0' * 32}.safetensors").mkdir()
    (tmp_path / f"tts-{'1' * 32}.safetensors").symlink_to("nowhere")
    folder = SnapshotFolder(tmp_path, limit_bytes=1)
    content = Content()
    content.write(folder)
    assert content.read(folder)


def test_many_threads_write_and_read_the_same_snapshot(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path)

    def use() -> bool:
        mine = Content()
        return all((folder.write("tts", RANGES, mine.hashes, mine.raw), mine.read(folder))[1] for _ in range(20))

    assert all(worker.result() for worker in [Worker(use) for _ in range(4)])
    assert len(listing(folder)) == 1


def test_spans_are_read_to_their_own_places_over_the_gaps_between_groups(
    folder: SnapshotFolder, device: SimulatedDevice
) -> None:
    tensors = {str(number): torch.randn(1 + number * 7) for number in range(60)}
    before = {name: bytes_of(tensor) for name, tensor in tensors.items()}
    with small_layout(span_bytes=64, group_bytes=512):
        weights = Weights(tensors, device)
        weights.save(folder, "tts")
        assert weights._layout.nbytes > sum(map(len, before.values())), "there are gaps"
        weights.load(folder, "tts")
        weights.restore()
    assert {name: bytes_of(tensor) for name, tensor in tensors.items()} == before


def test_loading_twice_or_without_a_save_is_refused(folder: SnapshotFolder, device: SimulatedDevice) -> None:
    weights = Weights({"t": torch.randn(100)}, device)
    with pytest.raises(SnapshotUnusable, match="nothing was saved"):
        weights.load(folder, "tts")
    weights.save(folder, "tts")
    weights.load(folder, "tts")
    with pytest.raises(SnapshotUnusable, match="nothing was saved"):
        weights.load(folder, "tts")


def test_weights_of_one_value_need_no_file(folder: SnapshotFolder, device: SimulatedDevice) -> None:
    tensor = torch.full((1 << 19,), -0.0)
    weights = Weights({"t": tensor}, device)
    weights.save(folder, "tts")
    assert listing(folder) == []
    weights.load(folder, "tts")
    weights.restore()
    assert bytes_of(tensor) == b"\0\0\0\x80" * (1 << 19)


def test_an_engine_that_would_stay_in_main_memory_is_not_saved(folder: SnapshotFolder) -> None:
    class Half(SimulatedDevice):
        def holds_tensor(self, tensor: torch.Tensor) -> bool:
            return tensor.dtype is torch.float32

    tensors = {"here": torch.ones(10), "there": torch.ones(65 << 20, dtype=torch.uint8)}
    weights = Weights(tensors, Half(1 << 30))
    with pytest.raises(SnapshotUnusable, match="main memory"):
        weights.save(folder, "tts")
    assert weights.device_bytes == 40
