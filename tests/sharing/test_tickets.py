"""The queue for room across processes: all orders of its calls for three processes that crash, stop and continue."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from residency.sharing.tickets import (
    STALE_AFTER_S,
    Ticket,
    Tickets,
    enter,
    leave,
    offered_bytes,
    share_of,
    step,
    waiting,
)

STALE_S = -2 * STALE_AFTER_S


@dataclass(frozen=True)
class Process:
    """``phase``: out, waiting, claimed (its move runs), moved (its bytes are there, its ticket too), or holding."""

    phase: str = "out"
    runs: str = "yes"  # or "stopped", "crashed"
    arrived_s: int = 0
    knows: bool = True  # the size of its model

    @property
    def holds(self) -> bool:
        return self.phase in ("moved", "holding")


@dataclass(frozen=True)
class World:
    """``fenced``: a claimed ticket was removed as stale, so that a move may meet a card that is full."""

    processes: tuple[Process, ...]
    tickets: Tickets = ()
    fenced: bool = False

    def changed(self, who: int, process: Process, tickets: Tickets | None = None, fenced: bool = False) -> World:
        """Returns the world with one process and the tickets replaced, and its times as small as possible."""
        processes = (*self.processes[:who], process, *self.processes[who + 1 :])
        tickets = self.tickets if tickets is None else tickets
        times = sorted({each.arrived_s for each in processes if each.phase != "out"} | {t.arrived_s for t in tickets})
        if times != [*range(len(times))]:
            rank = {time_s: place for place, time_s in enumerate(times)}
            processes = tuple(replace(each, arrived_s=rank.get(each.arrived_s, 0)) for each in processes)
            tickets = tuple(replace(ticket, arrived_s=rank[ticket.arrived_s]) for ticket in tickets)
        return World(
            processes,
            tuple(sorted(tickets, key=lambda ticket: ticket.key)),
            self.fenced or fenced,
        )


class Campaign:
    """All worlds that can be reached; ``sizes``: the bytes of each process's model on a card of ``capacity``.

    Those in ``unknown`` do not know the size before their first load.
    """

    def __init__(self, capacity: int, sizes: tuple[int, ...], unknown: tuple[int, ...]) -> None:
        self.capacity, self.sizes, self.unknown = capacity, sizes, unknown
        first = World(tuple(Process(knows=who not in unknown) for who in range(len(sizes))))
        self.next: dict[World, list[World]] = {}
        todo = deque([first])
        while todo:
            world = todo.popleft()
            if world not in self.next:
                self.next[world] = [*self.steps(world)]
                todo.extend(self.next[world])
                todo.extend(self.faults(world))

    def free(self, world: World) -> int:
        held = [size for size, each in zip(self.sizes, world.processes, strict=True) if each.holds]
        assert sum(held) <= self.capacity
        return self.capacity - sum(held)

    def ticket(self, world: World, who: int) -> Ticket:
        process = world.processes[who]
        return Ticket(str(who), "tts", who, process.arrived_s, self.sizes[who] if process.knows else 0, 0.0)

    def steps(self, world: World) -> Iterator[World]:
        """What processes do that run, and what time does to the tickets of the others."""
        for who, process in enumerate(world.processes):
            if process.runs == "yes":
                yield from self.act(world, who, process)
        stale = tuple(
            replace(t, beat_s=STALE_S) if world.processes[int(t.key)].runs != "yes" else t for t in world.tickets
        )
        yield world.changed(0, world.processes[0], stale)

    def act(self, world: World, who: int, process: Process) -> Iterator[World]:
        mine, key = self.ticket(world, who), str(who)
        if process.phase == "out":
            process = replace(process, phase="waiting", arrived_s=len(world.processes) + 1)
            yield world.changed(who, process, enter(world.tickets, replace(mine, arrived_s=process.arrived_s)))
        elif process.phase == "waiting":
            tickets, claimed = step(world.tickets, mine, self.free(world), 0.0)
            lost = {t.key for t in world.tickets if t.claimed} - {t.key for t in tickets}
            # A process that has crashed moves nothing any more; one that was stopped does.
            fenced = any(world.processes[int(other)].runs != "crashed" for other in lost)
            if claimed:
                self.check_claim(world, who, process)
            yield world.changed(who, replace(process, phase="claimed" if claimed else "waiting"), tickets, fenced)
        elif process.phase == "claimed":
            if self.free(world) >= self.sizes[who]:
                # A first load takes bytes that another move may have claimed.
                yield world.changed(who, replace(process, phase="moved", knows=True), fenced=not process.knows)
            else:  # the move has failed, and waits for room again
                assert world.fenced or not process.knows, f"two processes have claimed the same bytes: {world}"
                process = replace(process, phase="waiting", knows=True)
                mine = replace(mine, wanted_bytes=self.sizes[who])
                yield world.changed(who, process, enter(world.tickets, mine))
        elif process.phase == "moved":
            yield world.changed(who, replace(process, phase="holding"), leave(world.tickets, key))
        else:
            yield world.changed(who, Process(knows=who not in self.unknown))

    def check_claim(self, world: World, who: int, process: Process) -> None:
        loading = any(t.claimed and t.wanted_bytes == 0 and t.beat_s == 0.0 for t in world.tickets)
        for other, its in enumerate(world.processes):
            older = its.phase == "waiting" and its.runs == "yes" and its.arrived_s < process.arrived_s
            there = any(t.key == str(other) and t.beat_s == 0.0 for t in world.tickets)
            passed = loading and process.knows and not its.knows  # a first load that waits for another one
            assert not (older and there) or passed, f"{who} has overtaken {other}: {world}"
            loads = its.phase == "claimed" and not its.knows and not process.knows
            assert not (loads and there), f"{who} and {other} load at once: {world}"

    def faults(self, world: World) -> Iterator[World]:
        for who, process in enumerate(world.processes):
            if process.runs == "yes":
                # The driver frees the bytes of a process that ends; its ticket stays.
                yield world.changed(who, Process(runs="crashed"))
                if not any(each.runs == "stopped" for each in world.processes):
                    yield world.changed(who, replace(process, runs="stopped"))
            elif process.runs == "stopped":
                yield world.changed(who, replace(process, runs="yes"))

    def can_be_served(self, who: int) -> set[World]:
        """Returns the worlds from which a process can get its bytes without any fault."""
        before: dict[World, list[World]] = {}
        for world, after in self.next.items():
            for each in after:
                before.setdefault(each, []).append(world)
        found = {world for world in self.next if world.processes[who].holds}
        todo = list(found)
        while todo:
            for world in before.get(todo.pop(), ()):
                if world not in found:
                    found.add(world)
                    todo.append(world)
        return found


@pytest.mark.parametrize(
    ("capacity", "sizes", "unknown"),
    [(2, (2, 2, 2), ()), (4, (2, 3, 1), ()), (4, (2, 3, 1), (0, 1))],
    ids=str,
)
def test_no_bytes_are_claimed_twice_nobody_overtakes_and_nobody_waits_for_ever(
    capacity: int, sizes: tuple[int, ...], unknown: tuple[int, ...]
) -> None:
    campaign = Campaign(capacity, sizes, unknown)
    assert len(campaign.next) > 1000
    for who in range(len(sizes)):
        served = campaign.can_be_served(who)
        for world in campaign.next:
            process = world.processes[who]
            pairs = [*zip(sizes, world.processes, strict=True)]
            kept = sum(size for size, each in pairs if each.holds and each.runs == "stopped")
            # Nobody is overtaken: it also waits for those before it, which may wait for bytes of a stopped process.
            before = [size for size, each in pairs if each.runs == "yes" and each.arrived_s <= process.arrived_s]
            if process.phase == "waiting" and process.runs == "yes" and kept + max(before) <= capacity:
                assert world in served, f"{who} waits for ever: {world}"


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
