"""A snapshot is complete and correct, or rejected; folders respect their limit, and several processes may share one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import safetensors
import torch
from engine_strategies import bytes_of, small_layout
from fakes import Worker
from snapshot_files import RANGES, Content, listing, refused

from gpu_manager import SimulatedDevice
from residency.errors import InvalidInput, SnapshotUnusable
from residency.memory.snapshot import SnapshotFolder
from residency.memory.weights import Weights


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


def test_a_flipped_bit_anywhere_is_noticed(folder: SnapshotFolder, content: Content) -> None:
    path = content.write(folder)
    whole = path.read_bytes()
    edges = [0, 7, 8, 100, 4095, 4096, 5095, 5096, 5097, len(whole) - 1]
    for place in edges + random.Random(0).sample(range(len(whole)), 150):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert str(path) in refused(folder, content), f"byte {place}"
        content.write(folder)  # like the next release
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
    path.mkdir()  # a folder: root can read any file
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


# -- the limit --------------------------------------------------------------------------------------------------

FILE_BYTES = 10_000 + 4096


def ages(*paths: Path) -> None:
    """Makes these the oldest, in this order."""
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


def test_a_file_that_another_process_removes_before_it_is_locked_is_created_again(
    tmp_path: Path, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SnapshotFolder(tmp_path)
    flock = fcntl.flock
    removed = []

    def flock_after_another_has_started(file: BinaryIO, operation: int) -> None:
        if not removed:
            before = set(tmp_path.glob(".tts*.tmp"))
            removed.append(before)
            SnapshotFolder(tmp_path)
            assert before
            assert not before & set(tmp_path.iterdir())
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_another_has_started)
    path = content.write(folder)
    assert removed
    assert content.read(folder)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


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
        assert weights.mirror.layout.nbytes > sum(map(len, before.values())), "there are gaps"
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
