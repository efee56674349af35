"""Finds processes outside of this project that need memory of the card, from what the driver says of each process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .tickets import STRANGER, Ticket

SATISFIED_AFTER_S = 1.0
"""Time without growth, while the headroom is free, after which a process needs no more."""

GIVEN_UP_AFTER_S = 30.0
"""Time after its first need, while less is free, after which a process goes to the end of the queue."""


class Strangers:
    """Processes that have grown while little memory was left: each has a ticket in the queue until it is satisfied.

    ``headroom_bytes``: little is left if less is free, or less than a process has grown by since the last look.
    """

    def __init__(self, headroom_bytes: int) -> None:
        self._headroom_bytes = headroom_bytes
        self._held: Mapping[int, int] | None = None
        self._grew_s: dict[int, float] = {}
        #: Tickets of those that need memory, by pid.
        self.asking: dict[int, Ticket] = {}

    def forget(self) -> None:
        """To be called before a pause of the looks."""
        self._held = None
        self._grew_s.clear()
        self.asking.clear()

    def look(self, held: Mapping[int, int], free_bytes: int, now_s: float) -> None:
        """Takes the bytes of each process at ``now_s``, and what is free."""
        before, self._held = held if self._held is None else self._held, held
        for pid, nbytes in held.items():
            growth = nbytes - before.get(pid, 0)
            if growth > 0:
                self._grew_s[pid] = now_s
            wanted_bytes = max(self._headroom_bytes, growth)
            if growth > 0 and free_bytes < wanted_bytes and pid not in self.asking:
                self.asking[pid] = Ticket(f"{STRANGER}{pid}", "", pid, now_s, wanted_bytes, now_s)
        for pid, ticket in list(self.asking.items()):
            has_room = free_bytes >= self._headroom_bytes
            ends_s = self._grew_s[pid] + SATISFIED_AFTER_S if has_room else ticket.arrived_s + GIVEN_UP_AFTER_S
            if now_s > ends_s or pid not in held:
                del self.asking[pid]
            else:
                self.asking[pid] = replace(ticket, beat_s=now_s)
