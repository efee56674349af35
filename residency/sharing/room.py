"""Room on the card for the moves of this process: each waits in the queue of all processes, and claims its bytes."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol, TypeVar

from ..arrivals import Arrival, NoRoomNow
from ..contracts import Device
from ..sentences import Sentence
from .asking import Asking
from .board import Board, BoardBusy, PrivateBoard
from .processes import identity_of, other_processes, shortage
from .tickets import Ticket, Tickets, alive, claimed_bytes, enter, leave, offered_bytes, step, waiting

T = TypeVar("T")

logger = logging.getLogger(__name__)

STEP_EVERY_S = 0.05
"""Interval in which a waiting move looks for room."""

PAUSE_S = 1.0
"""Pause after the queue was busy. With `board.BUSY_AFTER_S`, claims are renewed before they are stale."""

NAME_EVERY_S = 1.0
"""Interval in which a waiting move looks up which processes hold the card."""


class Leaving(Protocol):
    """Moves models of this process off the card. Thread-safe."""

    def on_card(self) -> bool:
        """Returns whether a model is on the card or moves there."""

    def own_pids(self) -> set[int]:
        """Returns this process, and those of its models."""

    def count_on_card(self) -> int | None:
        """Returns how many processes of this app use the card, once a model is there; None if engines have some."""

    def offers(self) -> dict[str, tuple[float, int]]:
        """Returns the models that `leave` would move without ``before_s``, and those on their way off the card.

        For each since when it is idle, by ``time.monotonic``, and its bytes.
        """

    def leave(self, nbytes: int, before_s: float | None) -> tuple[dict[str, int], int]:
        """Begins to move idle models off the card, longest idle first, until ``nbytes`` are freed.

        Returns the bytes of each, and how many still lack once all that are on their way have left; those in use are
        not on their way. Models whose minimum stay has not ended, and those with keep-warm -1, stay.
        ``before_s``: another process's request has waited since then: models that are in use, or whose next request
        came later, leave after their current request.
        """


class Room:
    """The places of this process's moves in the queue for a card. Thread-safe.

    Args:
        headroom_bytes: stay free when a move is planned, without a request.
        board: the tickets of all processes of this project on the card, or of this process only.
        asking: the neighbours that are asked while a request lacks memory.
        wake: called when a move begins, and when neighbours have been asked.
        presence: how the keys begin of the tickets that mark the presence of this process.
    """

    def __init__(
        self,
        device: Device,
        leaving: Leaving,
        headroom_bytes: int,
        board: Board | PrivateBoard,
        asking: Asking,
        wake: Callable[[], None],
        presence: str,
    ) -> None:
        self._device, self._leaving, self._headroom_bytes = device, leaving, headroom_bytes
        self._board, self._asking, self._wake, self._presence = board, asking, wake, presence
        #: The tickets of moves that run, and this process's bytes on the card before each; None if unknown.
        self._claims: dict[str, tuple[Ticket, int | None]] = {}
        self._busy_until_s = -math.inf
        self._warned = False

    @property
    def is_moving(self) -> bool:
        return bool(self._claims)

    @contextlib.contextmanager
    def place(self, arrival: Arrival) -> Iterator[Callable[[int], None]]:
        """See `residency.arrivals.CardShare`."""
        now_s = time.monotonic()
        asked_s = now_s if arrival.asked_s is None else arrival.asked_s
        pid, started = identity_of(os.getpid())
        first = Ticket(uuid.uuid4().hex, arrival.model, pid, asked_s, 0, now_s, started=started)

        def claim(needed_bytes: int) -> None:
            ticket = replace(first, wanted_bytes=needed_bytes)
            self._claims.pop(ticket.key, None)
            self.change(lambda tickets: (enter(tickets, replace(ticket, beat_s=time.monotonic())), None))
            self._wait(ticket, arrival)
            self._claims[ticket.key] = ticket, self.own_bytes()
            self._wake()

        try:
            yield claim
        finally:
            self._claims.pop(first.key, None)
            self.change(lambda tickets: (leave(tickets, first.key), None))

    def own_bytes(self) -> int | None:
        """Returns the bytes of this process and its workers on the card; None if unknown."""
        return self._device.bytes_of(self._leaving.own_pids())

    def running(self, own_bytes: int | None, now_s: float) -> list[Ticket]:
        """Returns the tickets of moves that run, for a transaction: a move that ends removes its ticket after it.

        With the part of a move that has arrived, unless several run, or ``own_bytes`` is unknown.
        """
        claims, arrived_bytes = list(self._claims.values()), 0
        if len(claims) == 1 and own_bytes is not None and claims[0][1] is not None:
            arrived_bytes = max(0, own_bytes - claims[0][1])
        return [replace(ticket, beat_s=now_s, claimed=True, card_bytes=arrived_bytes) for ticket, _ in claims]

    def change(self, act: Callable[[Tickets], tuple[Tickets, T]]) -> T | None:
        """Changes the tickets; returns None if they cannot be changed now: then this process goes on without them."""
        if time.monotonic() < self._busy_until_s:
            return None
        try:
            result = self._board.change(act)
        except BoardBusy as error:
            self._busy_until_s = time.monotonic() + PAUSE_S
            if not self._warned:
                self._warned = True
                why: Sentence = error.args[0]
                logger.warning(
                    "The queue for the GPU cannot be used at the moment; requests go on without it (%s). "
                    "If this stays, delete the file while no app runs. / "
                    "暂时无法使用显卡队列，请求将在没有队列的情况下继续（%s）。"
                    "若持续出现，请在没有应用运行时删除该文件。",
                    why.en, why.zh,
                )  # fmt: skip
            return None
        self._warned = False
        return result

    def tickets(self) -> Tickets:
        """Returns the tickets for a status, which does not wait for them: none while they are locked."""
        with contextlib.suppress(BoardBusy):
            return self._board.tickets(busy_after_s=0.05)
        return ()

    def _wait(self, ticket: Ticket, arrival: Arrival) -> None:
        pause, named_s = threading.Event(), -math.inf
        while (tickets := self._claim(ticket, planned=arrival.asked_s is None)) is not None:
            if arrival.asked_s is None or not arrival.is_wanted():
                raise NoRoomNow
            memory = self._device.memory()
            lacking_bytes = 0 if memory.free_bytes is None else ticket.wanted_bytes - memory.free_bytes
            if lacking_bytes > 0:
                lacking_bytes = self._leaving.leave(lacking_bytes, ticket.arrived_s)[1]
                if lacking_bytes > offered_bytes(tickets, self._presence):  # more than idle models give up
                    self._asking.ask(ticket.wanted_bytes, arrival.is_wanted, self._wake)
            if (now_s := time.monotonic()) >= named_s + NAME_EVERY_S:
                named_s = now_s
                arrival.waits(ticket.wanted_bytes, self._reason(ticket, memory.free_bytes, now_s))
            pause.wait(STEP_EVERY_S)

    def _reason(self, ticket: Ticket, free_bytes: int | None, now_s: float) -> Sentence:
        others = other_processes(self._device, self._leaving.own_pids())
        tickets = self.tickets()
        earlier = [each.key for each in waiting(tickets, now_s)]
        place = earlier.index(ticket.key) if ticket.key in earlier else 0
        return shortage(ticket.wanted_bytes, free_bytes, others, claimed_bytes(alive(tickets, now_s)), place)

    def _claim(self, ticket: Ticket, planned: bool) -> Tickets | None:
        """Claims the bytes; returns None if they are claimed, else all tickets that count."""

        def act(tickets: Tickets) -> tuple[Tickets, tuple[bool, Tickets]]:
            now_s, free_bytes = time.monotonic(), self._device.memory().free_bytes
            if free_bytes is not None and planned:
                free_bytes -= self._headroom_bytes
            tickets, claimed = step(tickets, replace(ticket, beat_s=now_s), free_bytes, now_s)
            return tickets, (claimed, tickets)

        if (answer := self.change(act)) is not None:
            claimed, tickets = answer
            return None if claimed else tickets
        free_bytes = self._device.memory().free_bytes  # without the queue
        return None if free_bytes is None or free_bytes >= ticket.wanted_bytes else ()
