from __future__ import annotations

import pytest
from fakes import FakeResident

from residency.errors import SnapshotUnusable
from residency.memory import CompositeResident


def test_bytes_add_up_and_parts_move_together() -> None:
    parts = FakeResident(1), FakeResident(2)
    both = CompositeResident(*parts)
    assert (both.device_bytes, both.host_bytes) == (3, 0)
    assert both.offload() == 3
    assert (both.device_bytes, both.host_bytes) == (0, 3)
    assert both.restore() == 3
    assert both.release() == 3


@pytest.mark.parametrize(("move", "undo", "failing"), [("offload", "restore", 0), ("restore", "offload", 1)])
def test_a_part_that_fails_brings_the_others_back(move: str, undo: str, failing: int) -> None:
    parts = FakeResident(), FakeResident()
    both = CompositeResident(*parts)
    if move == "restore":
        both.offload()
    parts[failing].fail_next[move] = MemoryError()
    places = [part.place for part in parts]
    with pytest.raises(MemoryError):
        getattr(both, move)()
    assert [part.place for part in parts] == places
    assert parts[1 - failing].log[-2:] == [move, undo]


def test_a_part_that_cannot_be_saved_brings_those_before_it_back_to_the_host() -> None:
    parts = FakeResident(), FakeResident()
    parts[1].fail_next["save"] = SnapshotUnusable("tts", "no")
    with pytest.raises(SnapshotUnusable):
        CompositeResident(*parts).save(None, "tts")
    assert [part.place for part in parts] == ["host", "device"]
    assert parts[0].log == ["save", "load"]


def test_parts_are_saved_and_loaded_together() -> None:
    parts = FakeResident(1), FakeResident(2)
    both = CompositeResident(*parts)
    assert both.save(None, "tts") == 3
    assert [part.place for part in parts] == ["disk", "disk"]
    assert both.load(None, "tts") == 3
    assert (both.device_bytes, both.host_bytes) == (0, 3)


def test_an_error_that_is_no_ordinary_one_undoes_too() -> None:
    parts = FakeResident(), FakeResident()
    both = CompositeResident(*parts)
    both.offload()
    parts[1].fail_next["restore"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        both.restore()
    assert [part.place for part in parts] == ["host", "host"]


def test_a_part_that_cannot_be_loaded_leaves_nothing_in_memory() -> None:
    parts = FakeResident(), FakeResident()
    both = CompositeResident(*parts)
    both.save(None, "tts")
    parts[1].fail_next["load"] = MemoryError()
    with pytest.raises(MemoryError):
        both.load(None, "tts")
    assert both.host_bytes == 0
