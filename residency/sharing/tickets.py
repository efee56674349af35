"""The queue for room on one card across processes. Pure: decides from tickets, the time and the free bytes.

A process enters a ticket before a model moves to the card, steps until it may claim the bytes, moves the model, and
removes the ticket. The oldest waiting ticket claims first, as soon as its bytes are free beyond those of other claims;
it is never overtaken, also not by a smaller one. A ticket without a heartbeat for `STALE_AFTER_S` counts no more: its
process has crashed, or is stopped. A stopped process that continues finds its ticket missing and enters again, with its
first time of arrival. If its move was running, it goes on: two moves may then need the same bytes, and the one that
finds the card full waits again. So does a first load, for which nothing is reserved, since its size is unknown; only
one of these runs at a time. Processes with idle models enter a ticket for each, too: it says what the model gives up.

Each function takes all tickets of a card and returns the tickets after it; `Board` makes each call one transaction.
``tests/sharing/test_queue_worlds.py`` checks all orders of `step`, `share_of`, entering and leaving for three processes
with a model each, or two and a program outside of this project: they give up, crash, stop and go on with what they did,
and move without the queue while it is locked. Not checked: `offered_bytes`, several models of a process, planned moves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

STALE_AFTER_S = 5.0
"""Time without a heartbeat after which a ticket counts no more."""

PRESENCE, STRANGER = "on-", "pid-"
"""How the keys begin of tickets that are those of no move."""


@dataclass(frozen=True)
class Ticket:
    """One model on its way to the card. Times in seconds of ``time.monotonic``, which all processes share.

    ``wanted_bytes``: 0 if unknown, before a first load. ``claimed``: the bytes are granted, and the move runs.
    ``card_bytes``: on the card at the heartbeat: the part of a claim that has arrived, or what an idle model gives up.
    ``pid``, ``started``: the process, see `processes.Identity`.
    """

    key: str
    model: str
    pid: int
    arrived_s: float
    wanted_bytes: int
    beat_s: float
    claimed: bool = False
    card_bytes: int = 0
    started: int = 0

    @property
    def marks_presence(self) -> bool:
        """Whether it only says that a process has a model on the card; ``arrived_s``: since when the model is idle."""
        return self.key.startswith(PRESENCE)

    @property
    def is_strangers(self) -> bool:
        """Whether it is that of a process outside of this project, which cannot enter its own."""
        return self.key.startswith(STRANGER)


Tickets = tuple[Ticket, ...]


def alive(tickets: Iterable[Ticket], now_s: float) -> Tickets:
    """Returns the tickets whose processes run."""
    # Heartbeats in the future are those of before a restart of the machine.
    return tuple(ticket for ticket in tickets if abs(now_s - ticket.beat_s) <= STALE_AFTER_S)


def enter(tickets: Tickets, ticket: Ticket) -> Tickets:
    """Adds a ticket, or replaces the one with its key."""
    return (*leave(tickets, ticket.key), ticket)


def leave(tickets: Tickets, key: str) -> Tickets:
    """Removes a ticket, if it is there."""
    return tuple(ticket for ticket in tickets if ticket.key != key)


def step(tickets: Tickets, mine: Ticket, free_bytes: int | None, now_s: float) -> tuple[Tickets, bool]:
    """Notes a heartbeat of ``mine``, and claims its bytes if it may. Returns the tickets and whether it is claimed.

    Removes stale tickets; enters ``mine``, also if it was removed as stale. ``free_bytes``: of the card at this moment,
    None where unknown.
    """
    others = alive(leave(tickets, mine.key), now_s)
    claimed = _may_claim(mine, others, free_bytes)
    return (*others, replace(mine, beat_s=now_s, claimed=claimed)), claimed


def waiting(tickets: Tickets, now_s: float) -> list[Ticket]:
    """Returns the tickets that wait, in the order in which they claim."""
    return sorted((ticket for ticket in alive(tickets, now_s) if not ticket.claimed), key=_order)


def claimed_bytes(tickets: Iterable[Ticket]) -> int:
    """Returns the bytes that are claimed and not on the card yet."""
    return sum(max(0, ticket.wanted_bytes - ticket.card_bytes) for ticket in tickets if _moves(ticket))


def offered_bytes(tickets: Iterable[Ticket], mine: str) -> int:
    """Returns what idle models of other processes give up; keys of this process's presence begin with ``mine``."""
    return sum(ticket.card_bytes for ticket in tickets if ticket.marks_presence and not ticket.key.startswith(mine))


def share_of(tickets: Iterable[Ticket], mine: str, lacking_bytes: int, needs: Ticket | None, now_s: float) -> int:
    """Returns how many of the lacking bytes a process gives up; keys of its presence tickets begin with ``mine``.

    Idle models leave longest idle first across processes, those of the process that ``needs`` the bytes before others.
    All processes give up what is then still lacking, after their current requests.
    """
    offers = [ticket for ticket in alive(tickets, now_s) if ticket.marks_presence and ticket.card_bytes]
    share = 0
    needing = needs and (needs.pid, needs.started)
    for offer in sorted(offers, key=lambda offer: ((offer.pid, offer.started) != needing, _order(offer))):
        if lacking_bytes <= 0:
            break
        lacking_bytes -= offer.card_bytes
        share += offer.card_bytes if offer.key.startswith(mine) else 0
    return share + max(0, lacking_bytes)


def _may_claim(mine: Ticket, others: Tickets, free_bytes: int | None) -> bool:
    moving = [other for other in others if _moves(other)]
    loads = any(other.wanted_bytes == 0 for other in moving)
    # First loads that wait for another one hold up nobody: they need no bytes that are known.
    earlier = [other for other in others if not other.claimed and _order(other) < _order(mine)]
    if any(other.wanted_bytes or not loads for other in earlier) or (mine.wanted_bytes == 0 and loads):
        return False
    if free_bytes is None:
        return not moving
    return mine.wanted_bytes <= max(0, free_bytes - claimed_bytes(moving))


def _moves(ticket: Ticket) -> bool:
    return ticket.claimed and not ticket.marks_presence


def _order(ticket: Ticket) -> tuple[float, str]:
    return ticket.arrived_s, ticket.key
