"""The file of the queue, and errors that pass."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import cast

import pytest

from gpu_manager import SimulatedDevice
from residency.scheduling.leaving import Leaving
from residency.sharing import room as room_module
from residency.sharing.asking import Asking
from residency.sharing.board import Board, BoardBusy
from residency.sharing.room import Room
from residency.sharing.tickets import Ticket

TICKET = Ticket("a", "tts", 1, 1.0, 5, 1.0)


def test_a_file_that_was_damaged_before_the_start_of_the_system_is_replaced(tmp_path: Path) -> None:
    board = Board(tmp_path, "GPU-1")
    board.change(lambda tickets: ((TICKET,), None))
    board.path.write_bytes(b"no database" * 400)
    for _ in range(2):
        with pytest.raises(BoardBusy):
            board.tickets()
    os.utime(board.path, (1.0, 1.0))
    with pytest.raises(BoardBusy):
        board.tickets()
    board.change(lambda tickets: ((TICKET,), None))
    assert Board(tmp_path, "GPU-1").tickets() == (TICKET,)
    assert board.path.stat().st_mode & 0o777 == 0o666


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
