"""The file of the queue: one for each start of the system, and errors that pass."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import cast

import pytest

from gpu_manager import SimulatedDevice
from residency.scheduling.leaving import Leaving
from residency.sharing import board as board_module
from residency.sharing import room as room_module
from residency.sharing.asking import Asking
from residency.sharing.board import Board, BoardBusy
from residency.sharing.room import Room
from residency.sharing.tickets import Ticket

TICKET = Ticket("a", "tts", 1, 1.0, 5, 1.0)


@pytest.fixture
def boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the kernel says of its start."""
    path = tmp_path / "boot_id"
    path.write_text("first\n")
    monkeypatch.setattr(board_module, "_BOOT", path)
    return path


def test_the_queue_of_before_a_restart_of_the_system_is_over_also_if_its_file_is_damaged(
    boot: Path, tmp_path: Path
) -> None:
    before = Board(tmp_path, "GPU-1")
    before.change(lambda tickets: ((TICKET,), None))
    assert Board(tmp_path, "GPU-1").tickets() == (TICKET,)
    before.path.write_bytes(b"\0" * 4096)
    with pytest.raises(BoardBusy):
        before.tickets()
    boot.write_text("second\n")
    assert Board(tmp_path, "GPU-1").tickets() == ()
    boot.unlink()
    assert Board(tmp_path, "GPU-1").tickets() == (), "a system that does not tell"


def test_files_of_earlier_starts_are_removed_unless_another_kernel_may_use_them(boot: Path, tmp_path: Path) -> None:
    boards = []
    for name, identity in (("old", "GPU-1"), ("recent", "GPU-1"), ("old", "GPU-2"), ("now", "GPU-1")):
        boot.write_text(name)
        boards.append(Board(tmp_path, identity))
        boards[-1].tickets()
        if name == "old":
            for path in tmp_path.glob(f"{boards[-1].path.name}*"):
                os.utime(path, (time.time() - 2 * 86400,) * 2)
    left = {path.name for path in tmp_path.glob("*.db*")}
    assert left == {f"{board.path.name}{end}" for board in boards[1:] for end in ("", "-journal")}


def test_each_time_that_the_queue_cannot_be_used_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(room_module, "PAUSE_S", 0.0)
    board, device = Board(tmp_path, "GPU-1"), SimulatedDevice(100)
    room = Room(device, cast(Leaving, None), 0, board, cast(Asking, None), lambda: None, "on-1")
    caplog.set_level(logging.WARNING)
    content = b""
    for count in (1, 2):
        assert room.change(lambda tickets: (tickets, 7)) == 7
        content = content or board.path.read_bytes()
        board.path.write_text("no database at all, and longer than the header of one " * 10)
        assert [room.change(lambda tickets: (tickets, 7)) for _ in range(3)] == [None] * 3
        board.path.write_bytes(content)
        assert len(caplog.records) == count
    for words in (str(board.path), "If this stays, delete the file", "请在没有应用运行时删除该文件"):
        assert words in caplog.text
