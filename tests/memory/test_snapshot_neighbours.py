"""Snapshots in a folder with foreign files. No test waits for another process."""

from __future__ import annotations

import errno
import faulthandler
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from snapshot_files import Content, listing, refused

from residency.memory import snapshot
from residency.memory.snapshot import SnapshotFolder


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    """Ends the run after a minute: opening a pipe without another end blocks."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A foreign file as the target of a link."""
    path = tmp_path / "theirs"
    path.write_text("precious")
    path.chmod(0o644)
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


PLANTED: dict[str, Callable[[Path, Path], object]] = {
    "a pipe": lambda path, elsewhere: os.mkfifo(path),
    "a link": lambda path, elsewhere: path.symlink_to(elsewhere),
    "a link to nothing": lambda path, elsewhere: path.symlink_to("/nowhere"),
    "a socket": lambda path, elsewhere: os.mknod(path, stat.S_IFSOCK | 0o600),
}
planted = pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED)


@planted
@pytest.mark.parametrize("name", [".tts-0.safetensors.1.tmp", f"tts-{'0' * 32}.safetensors"])
def test_what_was_planted_holds_up_neither_a_start_nor_a_write(
    tmp_path: Path, elsewhere: Path, content: Content, plant: Callable[[Path, Path], object], name: str
) -> None:
    (tmp_path / "s").mkdir()
    plant(tmp_path / "s" / name, elsewhere)
    folder = SnapshotFolder(tmp_path / "s", limit_bytes=1)
    written = content.write(folder)
    assert set(listing(folder)) == {name, written.name}
    assert content.read(folder)
    assert elsewhere.read_text() == "precious"
    assert mode(elsewhere) == 0o644


@planted
def test_what_stands_in_a_snapshots_place_counts_as_missing_and_is_replaced(
    folder: SnapshotFolder, elsewhere: Path, content: Content, plant: Callable[[Path, Path], object]
) -> None:
    path = content.write(folder)
    path.unlink()
    plant(path, elsewhere)
    assert "not one of ours" in refused(folder, content)
    content.write(folder)
    assert stat.S_ISREG(path.lstat().st_mode)
    assert content.read(folder)
    assert elsewhere.read_text() == "precious"


def test_a_link_to_a_snapshot_is_not_followed(folder: SnapshotFolder, content: Content, tmp_path: Path) -> None:
    path = content.write(folder)
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    assert "not one of ours" in refused(folder, content)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_not_believed(
    folder: SnapshotFolder, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checksums are no signatures: an attacker who can write them can match any weights."""
    os.chown(content.write(folder), 12345, 12345)
    assert "not one of ours" in refused(folder, content)
    assert content.write(folder).name == "nothing new"
    assert content.read(folder), "it was replaced by a file of our own"


def test_an_unreadable_file_of_another_user_counts_as_missing(
    folder: SnapshotFolder, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    content.write(folder)

    def refuse(path: Path) -> Any:  # simulated, since root can read every file
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as refused_by_system:
        refused_by_system.setattr(snapshot, "_open", refuse)
        assert "not one of ours" in refused(folder, content)


def test_nobody_else_reads_weights(tmp_path: Path, content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0)
    try:
        folder = SnapshotFolder(tmp_path / "new")
        during: list[int] = []
        write_file = snapshot._write_file

        def noted(file: Any, *rest: Any) -> None:
            during.append(os.fstat(file.fileno()).st_mode)
            write_file(file, *rest)

        monkeypatch.setattr(snapshot, "_write_file", noted)
        path = content.write(folder)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(each) for each in during] == [0o600]
    assert (mode(path), mode(folder.folder)) == (0o600, 0o700)


def test_snapshots_of_earlier_versions_are_closed_to_others(folder: SnapshotFolder, content: Content) -> None:
    path = content.write(folder)
    path.chmod(0o644)
    assert content.read(folder)
    assert mode(path) == 0o600
