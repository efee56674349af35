"""The queue for room across processes, call by call; `test_queue_worlds` goes through all orders of the calls."""

from __future__ import annotations

from dataclasses import replace

from residency.sharing.tickets import STALE_AFTER_S, Ticket, claimed_bytes, offered_bytes, share_of, step, waiting


def test_an_unknown_size_and_unknown_free_bytes() -> None:
    first = Ticket("a", "tts", 1, 0.0, 0, 0.0)
    tickets, claimed = step((), first, 0, 0.0)
    assert claimed, "before a first load, its size is unknown: the load finds out"
    assert step(tickets, Ticket("b", "tts", 2, 1.0, 5, 0.0), None, 0.0)[1] is False
    assert step((), Ticket("b", "tts", 2, 1.0, 5, 0.0), None, 0.0)[1] is True


def test_the_oldest_that_waits_is_the_next() -> None:
    old, young = Ticket("b", "tts", 1, 1.0, 5, 10.0), Ticket("a", "tts", 2, 2.0, 5, 10.0)
    assert waiting((young, old, replace(old, key="c", arrived_s=0.0, claimed=True)), 10.0) == [old, young]
    assert waiting((young, old), 10.1 + STALE_AFTER_S) == []


def test_a_heartbeat_of_before_a_restart_of_the_machine_counts_no_more() -> None:
    old = Ticket("a", "tts", 1, 5000.0, 5, 5000.0, True)
    assert waiting((replace(old, claimed=False),), 10.0) == []
    assert step((old,), Ticket("b", "tts", 2, 9.0, 5, 10.0), 5, 10.0)[1] is True


def test_longest_idle_models_of_all_processes_give_up_what_lacks_and_no_more() -> None:
    third = Ticket("w", "tts", 9, 50.0, 40, 100.0)
    idle = {"on-a": (1, 30.0, 20), "on-b": (2, 10.0, 20), "on-c": (3, 20.0, 20), "on-d": (9, 40.0, 10)}
    tickets = (third, *(Ticket(k, "", pid, since_s, 0, 100.0, True, n) for k, (pid, since_s, n) in idle.items()))

    def shares(lacking_bytes: int, needs: Ticket | None = None) -> list[int]:
        return [share_of(tickets, key, lacking_bytes, needs, 100.0) for key in idle]

    assert shares(20) == [0, 20, 0, 0]
    assert shares(21) == [0, 20, 20, 0]
    assert shares(70) == [20, 20, 20, 10]
    assert shares(80) == [30, 30, 30, 20], "those in use give up the rest"
    assert shares(15, third) == [0, 20, 0, 10], "first those of the process that needs the bytes"


def test_what_has_arrived_of_a_claim_is_not_counted_twice() -> None:
    moving = Ticket("a", "tts", 1, 0.0, 60, 0.0, True, 50)
    mine = Ticket("b", "tts", 2, 1.0, 30, 0.0)
    assert step((moving, mine), mine, 40, 0.0)[1]
    assert not step((moving, mine), mine, 39, 0.0)[1]


def test_a_process_that_is_on_the_card_holds_up_none_where_the_free_bytes_are_unknown() -> None:
    here = Ticket("on-a", "", 1, 0.0, 0, 0.0, True)
    assert step((here,), Ticket("b", "tts", 2, 1.0, 30, 0.0), None, 0.0)[1]


def test_known_sizes_do_not_wait_for_first_loads_that_wait_for_another_one() -> None:
    loads = Ticket("a", "tts", 1, 0.0, 0, 0.0, True)
    waits = Ticket("b", "tts", 2, 1.0, 0, 0.0)
    mine = Ticket("c", "tts", 3, 2.0, 30, 0.0)
    assert step((loads, waits, mine), mine, 30, 0.0)[1]
    assert not step((loads, waits, mine), waits, 30, 0.0)[1]
    assert not step((waits, mine), mine, 30, 0.0)[1], "it may begin itself"


def test_an_attempt_has_not_claimed_what_an_earlier_one_has() -> None:
    before = Ticket("a", "tts", 1, 0.0, 5, 0.0, True)
    assert not step((before,), replace(before, wanted_bytes=90, claimed=False), 5, 0.0)[1]


def test_apps_with_one_pid_in_two_containers_are_two() -> None:
    needs = Ticket("w", "tts", 7, 50.0, 20, 100.0, started=1)
    mine = Ticket("on-a", "", 7, 20.0, 0, 100.0, True, 20, started=1)
    other = Ticket("on-b", "", 7, 10.0, 0, 100.0, True, 20, started=2)
    assert share_of((needs, mine, other), "on-a", 20, needs, 100.0) == 20
    assert share_of((needs, mine, other), "on-b", 20, needs, 100.0) == 0
    assert offered_bytes((needs, mine, other), "on-a") == 20


def test_a_first_load_of_which_a_part_has_arrived_adds_no_room() -> None:
    loads = Ticket("a", "tts", 1, 0.0, 0, 0.0, True, 50)
    assert claimed_bytes([loads]) == 0
    assert not step((loads,), Ticket("b", "tts", 2, 1.0, 30, 0.0), 29, 0.0)[1]


def test_a_first_load_begins_also_where_more_is_claimed_than_is_free() -> None:
    moving = Ticket("a", "tts", 1, 0.0, 60, 0.0, True)
    assert step((moving,), Ticket("b", "tts", 2, 1.0, 0, 0.0), 10, 0.0)[1]


def test_models_of_processes_that_stand_still_give_up_nothing() -> None:
    stopped = Ticket("on-a", "", 1, 10.0, 0, 100.0 - 2 * STALE_AFTER_S, True, 20)
    mine = Ticket("on-b", "", 2, 20.0, 0, 100.0, True, 20)
    assert share_of((stopped, mine), "on-b", 20, None, 100.0) == 20


def test_processes_agree_on_the_order_of_what_came_at_the_same_time() -> None:
    """The queue returns its tickets in any order."""
    idle = [Ticket(f"on-{name}", "", pid, 10.0, 0, 100.0, True, 20) for pid, name in enumerate("ab")]
    moves = [Ticket(name, "tts", pid, 10.0, 20, 100.0) for pid, name in enumerate("ab")]
    for tickets in (idle + moves, moves[::-1] + idle[::-1]):
        assert [share_of(tickets, each.key, 20, None, 100.0) for each in idle] == [20, 0]
        assert waiting(tickets, 100.0) == moves
        assert [step(tuple(tickets), each, 40, 100.0)[1] for each in moves] == [True, False]
