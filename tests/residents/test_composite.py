from __future__ import annotations

import pytest
from fakes import FakeResident

from residency.residents import CompositeResident


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


def test_a_part_that_cannot_be_made_releases_those_before_it() -> None:
    first = FakeResident()

    def fails() -> FakeResident:
        raise MemoryError

    with pytest.raises(MemoryError):
        CompositeResident.build(lambda: first, fails)
    assert first.place == "nowhere"
