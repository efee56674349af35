"""Every byte of every storage has one position in the mirror, and spans respect their size limits."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from residency.memory.mirror import GROUP_BYTES, PAGE_BYTES, SPAN_BYTES, lay_out


@settings(deadline=None)
@given(st.lists(st.integers(0, 2000), max_size=30), st.sampled_from([8, 64, 1000]), st.sampled_from([1, 512, 10_000]))
def test_each_byte_lies_in_exactly_one_span_and_none_crosses_a_group(
    sizes: list[int], span_bytes: int, group_bytes: int
) -> None:
    layout = lay_out(sizes, span_bytes, group_bytes)
    reached = dict.fromkeys(range(len(sizes)), 0)
    for part in (part for span in layout.spans for part in span.parts):
        assert part.start == reached[part.index] < part.stop
        reached[part.index] = part.stop
    assert [*reached.values()] == sizes
    end = 0
    for span in layout.spans:
        assert 0 < span.nbytes <= span_bytes
        assert end <= span.start < end + PAGE_BYTES, "in order, with a gap below one page at most"
        assert span.start == end or span.start in layout.group_starts, "and gaps only where a group begins"
        assert not [start for start in layout.group_starts if span.start < start < span.stop]
        end = span.stop
    assert layout.nbytes == end
    assert layout.group_starts[0] == 0
    assert all(start % PAGE_BYTES == 0 for start in layout.group_starts)
    assert sorted(set(layout.group_starts)) == list(layout.group_starts)
    for start, following in zip(layout.group_starts, layout.group_starts[1:], strict=False):
        assert group_bytes <= following - start < group_bytes + span_bytes + PAGE_BYTES


def test_many_small_pieces_share_a_span_and_a_large_one_is_cut() -> None:
    layout = lay_out([1024] * 20_000 + [3 * SPAN_BYTES + 1])
    assert len(layout.spans) == 3 + 4
    assert [len(span.parts) for span in layout.spans[-4:]] == [1] * 4
    assert [span.nbytes for span in layout.spans[-4:]] == [SPAN_BYTES] * 3 + [1]


def test_gaps_cost_next_to_nothing() -> None:
    sizes = [GROUP_BYTES + 1] * 40
    layout = lay_out(sizes)
    assert layout.nbytes <= sum(sizes) * 1.0001
    assert len(layout.group_starts) <= 41


def test_nothing_has_a_layout_too() -> None:
    assert lay_out([]).spans == lay_out([0, 0]).spans == ()
    assert lay_out([]).nbytes == 0
