"""Which processes outside of this project need memory of the card."""

from __future__ import annotations

from residency.sharing.strangers import GIVEN_UP_AFTER_S, SATISFIED_AFTER_S, Strangers

PID = 77


def asking(*looks: tuple[int, int, float]) -> list[int]:
    """Returns the pids that ask after looks at (bytes of one process, free bytes, time); the headroom is 10 bytes."""
    strangers = Strangers(10)
    for held_bytes, free_bytes, now_s in looks:
        strangers.look({PID: held_bytes} if held_bytes else {}, free_bytes, now_s)
    return list(strangers.asking)


def test_one_that_grows_into_what_is_left_asks() -> None:
    assert asking((5, 50, 0.0), (50, 5, 1.0)) == [PID]
    assert asking((5, 50, 0.0), (35, 20, 1.0)) == [PID], "the next growth of that size would not fit"
    assert asking((5, 50, 0.0), (15, 40, 1.0)) == []
    assert asking((50, 5, 0.0), (50, 5, 1.0)) == [], "it was there before"


def test_one_that_has_room_and_does_not_take_it_asks_no_more() -> None:
    grown = (5, 90, 0.0), (65, 20, 1.0)
    assert asking(*grown, (65, 40, 1.0 + SATISFIED_AFTER_S)) == [PID]
    assert asking(*grown, (65, 40, 1.1 + SATISFIED_AFTER_S)) == [], "as much as it has grown by need not be free"


def test_one_that_stops_growing_on_a_full_card_asks_no_more_after_a_while() -> None:
    grown = (5, 90, 0.0), (95, 5, 1.0)
    assert asking(*grown, (95, 5, GIVEN_UP_AFTER_S)) == [PID]
    assert asking(*grown, (95, 5, 1.1 + GIVEN_UP_AFTER_S)) == []
    assert asking(*grown, (0, 100, 1.2)) == [], "it has ended"


def test_one_that_grows_again_and_again_goes_to_the_end_of_the_queue_after_a_while() -> None:
    flickers = [(95 + each % 2, 5, float(each)) for each in range(int(GIVEN_UP_AFTER_S) + 3)]
    assert asking((5, 90, -1.0), *flickers[:-2]) == [PID]
    assert asking((5, 90, -1.0), *flickers[:-1]) == []
    assert asking((5, 90, -1.0), *flickers) in ([PID], []), "with a new place"
