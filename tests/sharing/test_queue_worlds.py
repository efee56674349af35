"""The queue for room across processes: all that can happen to a few processes on one card, step by step.

Each runs one model: it arrives in the queue, moves (in two parts), is used, idle, and leaves for others; it gives up,
is killed, is stopped and goes on, or moves without the queue while its file is locked. All of these at any time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest

from residency.sharing.tickets import (
    PRESENCE,
    STALE_AFTER_S,
    STRANGER,
    Ticket,
    Tickets,
    alive,
    claimed_bytes,
    share_of,
    step,
    waiting,
)

STALE_S = -2 * STALE_AFTER_S


class Process(NamedTuple):
    """``phase``: out, waiting, claimed (its move runs), half (a part has come), moved, used, idle.

    ``since``: its place among those that have arrived, or that are idle. ``ticket``: "", waits, claimed or idle, as the
    queue has it; ``fresh``: it is not stale; ``part``: the bytes that it tells are on the card. ``unsafe``: its move
    may take bytes that others have claimed, or has taken such.
    """

    phase: str = "out"
    runs: str = "yes"  # or stopped, crashed
    knows: bool = True  # the size of its model
    since: int = 0
    ticket: str = ""
    fresh: bool = False
    part: int = 0
    unsafe: bool = False


World = tuple[Process, ...]
GONE = Process(runs="crashed")
STEP, LUCK = True, False
"""Whether something is sure to happen once the processes that run have time, or may happen."""


class Campaign:
    """All worlds that can be reached, and from which others each can be reached by steps.

    Args:
        sizes: the bytes of each process's model, on a card of ``capacity``.
        unknown: those that do not know the size before their first load.
        stranger: the last is a program outside of this project: it grows and shrinks as it likes, and is noticed.
        stops: how many may be stopped at the same time.
        tells: whether the driver tells how much is free.
        parts: whether moves have two parts, and the queue is told of the first one.
    """

    def __init__(
        self,
        capacity: int,
        sizes: tuple[int, ...],
        unknown: tuple[int, ...] = (),
        stranger: bool = False,
        stops: int = 1,
        tells: bool = True,
        parts: bool = True,
    ) -> None:
        self.capacity, self.sizes, self.stranger, self.stops = capacity, sizes, stranger, stops
        self.tells, self.parts = tells, parts
        #: Processes that are all alike but for the first: worlds that differ in their order are one.
        self.are_alike = len(set(sizes)) == 1 and len(unknown) in (0, len(sizes)) and not stranger
        first = tuple(Process(knows=who not in unknown) for who in range(len(sizes)))
        self.worlds, self.before, numbers = [first], list[list[int]]([[]]), {first: 0}
        for number, world in enumerate(self.worlds):  # which grows
            for after, is_step in self.events(world, self.free(world)):
                known = numbers.setdefault(after, len(self.worlds))
                if known == len(self.worlds):
                    self.worlds.append(after)
                    self.before.append([])
                if is_step and known != number:
                    self.before[known].append(number)

    def on_card(self, who: int, process: Process) -> int:
        if process.runs == "crashed" or process.phase in ("out", "waiting", "claimed"):
            return 0  # the driver frees the bytes of a process that ends
        return 1 if process.phase == "half" else self.sizes[who]

    def free(self, world: World) -> int:
        free_bytes = self.capacity - sum(map(self.on_card, range(len(world)), world))
        assert free_bytes >= 0
        return free_bytes

    def ticket(self, who: int, process: Process) -> Ticket:
        """Returns the ticket that a process has in the queue, or enters."""
        wanted_bytes = self.sizes[who] if process.knows else 0
        return ticket_of(process, who, self.sizes[who], wanted_bytes, self.is_stranger(who))

    def tickets(self, world: World) -> Tickets:
        return tuple(self.ticket(who, each) for who, each in enumerate(world) if each.ticket)

    def is_stranger(self, who: int) -> bool:
        return self.stranger and who == len(self.sizes) - 1

    def changed(self, world: World, who: int, process: Process, **changes: Any) -> World:
        """Returns the world with one process replaced; times as small as possible."""
        processes = [*world]
        processes[who] = process._replace(**changes)
        for idle in (True, False) if processes[who].since != world[who].since else ():
            times = sorted(each.since for each in processes if each.since and (each.phase == "idle") is idle)
            if times and times[-1] > len(times):
                for number, each in enumerate(processes):
                    if each.since and (each.phase == "idle") is idle:
                        processes[number] = each._replace(since=times.index(each.since) + 1)
        return (processes[0], *sorted(processes[1:])) if self.are_alike else tuple(processes)

    def events(self, world: World, free: int) -> Iterator[tuple[World, bool]]:
        stops = sum(each.runs == "stopped" for each in world) < self.stops
        for who, process in enumerate(world):
            if self.is_stranger(who):
                yield from self.stranger_acts(world, who, process, free)
                continue
            if process.runs == "yes":
                yield from self.acts(world, who, process, free)
                if stops and process.phase != "out":
                    yield self.changed(world, who, process, runs="stopped"), LUCK
            elif process.runs == "stopped":
                yield self.changed(world, who, process, runs="yes"), LUCK
                if process.fresh:
                    yield self.changed(world, who, process, fresh=False), STEP
            if process.runs != "crashed":
                yield self.changed(world, who, crashed(process)), LUCK
            elif process.ticket:
                yield self.changed(world, who, GONE), STEP

    def acts(self, world: World, who: int, process: Process, free: int) -> Iterator[tuple[World, bool]]:
        size = self.sizes[who]
        match process.phase:
            case "out":
                yield self.changed(world, who, process, phase="waiting", since=9, ticket="waits", fresh=True), LUCK
            case "waiting":
                yield self.steps(world, who, process, free), STEP
                yield self.changed(world, who, process, **OUT), LUCK  # gives up
                if free >= size or not process.knows:  # the file of the queue is locked
                    yield self.changed(world, who, process, phase="claimed", unsafe=True), LUCK
            case "claimed" | "half":
                here = self.on_card(who, process)
                if (process.ticket, process.fresh, process.part) != ("claimed", True, here):
                    yield self.changed(world, who, process, ticket="claimed", fresh=True, part=here), STEP
                yield (
                    self.arrives(world, who, process, free, 1 if self.parts and size > 1 and not here else size - here),
                    STEP,
                )
            case "moved":
                yield self.changed(world, who, process, **{**OUT, "phase": "used", "unsafe": process.unsafe}), STEP
            case "used":
                yield self.changed(world, who, process, phase="idle", since=9, ticket="idle", fresh=True), STEP
            case "idle":
                if not process.fresh:
                    yield self.changed(world, who, process, ticket="idle", fresh=True), STEP
                yield self.changed(world, who, process, phase="used", since=0, ticket="", fresh=False), LUCK
                needed = process.fresh and gives_up(self.tickets(world), who, free)
                yield self.changed(world, who, process, **OUT), STEP if needed else LUCK

    def stranger_acts(self, world: World, who: int, process: Process, free: int) -> Iterator[tuple[World, bool]]:
        if process.phase == "used":
            yield self.changed(world, who, process, phase="out", unsafe=False), LUCK
        elif free >= self.sizes[who]:
            unsafe = free - self.sizes[who] < self.claimed(world, who)
            yield self.changed(world, who, process, phase="used", unsafe=unsafe), LUCK
        watched = any(each.runs == "yes" and each.phase not in ("out", "waiting") for each in world[:who])
        if process.ticket:  # needs no more, or has grown again and again; or nobody is there who would renew it
            yield self.changed(world, who, process, ticket="", since=0, fresh=False), STEP
        elif watched:
            yield self.changed(world, who, process, ticket="waits", since=9, fresh=True), LUCK

    def steps(self, world: World, who: int, process: Process, free: int) -> World:
        mine = self.ticket(who, process._replace(ticket="waits", fresh=True))
        tickets, claimed = take_step(self.tickets(world), mine, free if self.tells else None)
        kept = {ticket.key for ticket in tickets}
        after = list(world)
        for number, each in enumerate(world):
            if each.ticket and self.ticket(number, each).key not in kept:
                unsafe = each.unsafe or (each.ticket == "claimed" and each.phase != "moved")
                after[number] = each._replace(ticket="", fresh=False, part=0, unsafe=unsafe)
        if claimed:
            self.check_claim(world, who, process)
            process = process._replace(phase="claimed", ticket="claimed", unsafe=not process.knows)
        return self.changed(tuple(after), who, process, ticket=process.ticket or "waits", fresh=True, part=0)

    def check_claim(self, world: World, who: int, process: Process) -> None:
        moving = [each for each in world if each.ticket == "claimed" and each.fresh]
        loading = not all(each.knows for each in moving)
        for each in world:
            earlier = each.ticket == "waits" and each.fresh and each.since < process.since
            passed = loading and process.knows and not each.knows  # a first load that waits for another one
            assert not earlier or passed, f"{who} has overtaken another: {world}"
        assert process.knows or not loading, f"two first loads at once: {world}"
        assert self.tells or not moving, f"two moves, although it is not known how much is free: {world}"

    def claimed(self, world: World, but: int) -> int:
        """Returns the bytes that moves have claimed and that are not on the card, but those of one process."""
        return sum(
            self.sizes[who] - self.on_card(who, each)
            for who, each in enumerate(world)
            if who != but and each.ticket == "claimed" and each.runs != "crashed" and each.knows
        )

    def arrives(self, world: World, who: int, process: Process, free: int, nbytes: int) -> World:
        if free >= nbytes:
            if self.on_card(who, process) + nbytes < self.sizes[who]:
                return self.changed(world, who, process, phase="half")
            unsafe = process.unsafe and free - nbytes < self.claimed(world, who)
            return self.changed(world, who, process, phase="moved", knows=True, unsafe=unsafe)
        # The move has failed, and waits for room again.
        unsafe = process.unsafe or any(each.unsafe and self.on_card(who, each) for who, each in enumerate(world))
        assert unsafe or not self.tells, f"two processes have claimed the same bytes: {world}"
        waits = {"phase": "waiting", "knows": True, "ticket": "waits", "fresh": True, "part": 0, "unsafe": False}
        return self.changed(world, who, process, **waits)

    def served(self, who: int) -> list[bool]:
        """Returns for each world whether a process gets its bytes by steps alone: no luck, and no faults."""
        found = [self.on_card(who, world[who]) == self.sizes[who] for world in self.worlds]
        todo = [number for number, is_served in enumerate(found) if is_served]
        while todo:
            for number in self.before[todo.pop()]:
                if not found[number]:
                    found[number] = True
                    todo.append(number)
        return found

    def check_nobody_waits_for_ever(self) -> None:
        for who in range(1 if self.are_alike else len(self.sizes) - self.stranger):
            for world, is_served in zip(self.worlds, self.served(who), strict=True):
                process = world[who]
                if is_served or process.phase != "waiting" or process.runs != "yes":
                    continue
                kept = [self.on_card(n, each) for n, each in enumerate(world)
                        if each.runs == "stopped" or self.is_stranger(n)]  # fmt: skip
                # Nobody is overtaken: it also waits for those before it, which may wait for bytes of a stopped process.
                before = [size for size, each in zip(self.sizes, world, strict=True)
                          if each.phase in ("waiting", "claimed", "half") and each.runs == "yes"
                          and each.since <= process.since]  # fmt: skip
                assert sum(kept) + max(before) > self.capacity, f"{who} waits for ever: {world}"


OUT: dict[str, Any] = {"phase": "out", "since": 0, "ticket": "", "fresh": False, "part": 0, "unsafe": False}


def crashed(process: Process) -> Process:
    if not process.ticket:
        return GONE
    phase = {"waits": "waiting", "claimed": "claimed", "idle": "idle"}[process.ticket]
    return process._replace(phase=phase, runs="crashed", unsafe=False) if process.fresh else GONE


@cache
def ticket_of(process: Process, who: int, size: int, wanted_bytes: int, is_stranger: bool) -> Ticket:
    beat_s, since_s = (0.0 if process.fresh else STALE_S), float(process.since)
    if is_stranger:
        return Ticket(f"{STRANGER}{who}", "", who, since_s, size, beat_s)
    if process.ticket == "idle":
        return Ticket(f"{PRESENCE}{who}", "", who, since_s, 0, beat_s, True, size)
    return Ticket(str(who), "tts", who, since_s, wanted_bytes, beat_s, process.ticket == "claimed", process.part)


take_step = cache(lambda tickets, mine, free_bytes: step(tickets, mine, free_bytes, 0.0))


@cache
def gives_up(tickets: Tickets, who: int, free_bytes: int) -> bool:
    """Returns whether an idle model leaves for the first in the queue."""
    first = next((ticket for ticket in waiting(tickets, 0.0) if ticket.wanted_bytes), None)
    if first is None:
        return False
    lacking_bytes = first.wanted_bytes - (free_bytes - claimed_bytes(alive(tickets, 0.0)))
    return lacking_bytes > 0 and share_of(tickets, f"{PRESENCE}{who}", lacking_bytes, first, 0.0) > 0


QUICK: list[tuple[int, tuple[int, ...], dict[str, Any]]] = [
    (2, (2, 2, 2), {"stops": 2, "parts": False}),
    (2, (2, 2, 2), {"unknown": (0, 1, 2), "parts": False}),
    (4, (2, 3, 1), {"parts": False}),
    (4, (2, 3, 1), {"unknown": (0, 1), "stops": 0}),
    (4, (2, 3, 2), {"stranger": True, "stops": 2}),
    (4, (2, 3), {"unknown": (0, 1), "stops": 2}),
    (4, (2, 3), {"tells": False}),
]
SLOW: list[tuple[int, tuple[int, ...], dict[str, Any]]] = [
    (2, (2, 2, 2), {"stops": 2}),
    (4, (2, 3, 1), {}),
    (4, (2, 3, 1), {"unknown": (0, 1)}),
    (4, (2, 3, 1), {"tells": False}),
    (3, (2, 1, 1), {}),
]
"""Two million worlds more: some minutes and gigabytes."""


@pytest.mark.parametrize(
    ("capacity", "sizes", "options"),
    QUICK + SLOW if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else QUICK,
    ids=str,
)
def test_no_bytes_are_claimed_twice_nobody_overtakes_and_nobody_waits_for_ever(
    capacity: int, sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    campaign = Campaign(capacity, sizes, **options)
    assert len(campaign.worlds) > 1000
    if campaign.tells:  # else nobody knows when to leave
        campaign.check_nobody_waits_for_ever()
