"""One card, many processes: leaves when others need room, and waits for room in order of arrival."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import psutil

from ..arrivals import Arrival, NoRoomNow
from ..contracts import Device
from ..errors import InvalidInput
from ..observability.events import Event
from ..status_types import SharingStatus
from . import Sharing
from .asking import Asking
from .board import Board, BoardBusy, PrivateBoard
from .processes import name_of, other_processes, shortage, with_parents
from .strangers import Strangers
from .tickets import PRESENCE, STALE_AFTER_S, Ticket, Tickets, alive, enter, first_waiting, leave, step

T = TypeVar("T")

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1
"""Interval of looks at the card while a model of this process is on it."""

STEP_EVERY_S = 0.05
"""Interval in which a waiting move looks for room."""


@dataclass(frozen=True)
class Yield:
    """Models left the card for another process. ``time_s``: of ``time.monotonic``; ``pid``: None if unknown."""

    time_s: float
    pid: int | None
    name: str
    nbytes: int
    models: tuple[str, ...]


class Leaving(Protocol):
    """Moves models of this process off the card. Thread-safe."""

    def on_card(self) -> bool:
        """Returns whether a model is on the card or moves there."""

    def own_pids(self) -> set[int]:
        """Returns this process, and those of its models."""

    def leave(self, nbytes: int, before_s: float | None) -> tuple[dict[str, int], int]:
        """Begins to move idle models off the card, longest idle first, until ``nbytes`` are freed.

        Returns the bytes of each, and how many still lack once all that are on their way have left; those in use are
        not on their way. Models whose minimum stay has not ended, and those with keep-warm -1, stay.
        ``before_s``: another process's request has waited since then: models that are in use, or whose next request
        came later, leave after their current request.
        """


class SharedCard:
    """The use of one card by this process beside others.

    Args:
        headroom_bytes: when less is free, idle models leave the card; 0: they do not.
        board: the tickets of all processes of this project on the card, or of this process only.
        asking: the neighbours that are asked for memory.

    The thread that watches the card sleeps while no model is on it: at the latest `STALE_AFTER_S` after the last left.
    """

    def __init__(
        self,
        device: Device,
        leaving: Leaving,
        *,
        headroom_bytes: int,
        board: Board | PrivateBoard,
        asking: Asking,
    ) -> None:
        self.headroom_bytes = headroom_bytes
        self.last_yield: Yield | None = None
        self.yields = 0
        self._device, self._leaving = device, leaving
        self._board, self.asking = board, asking
        self._claims: dict[str, Ticket] = {}
        self._strangers = Strangers(headroom_bytes)
        self._parents: dict[int, frozenset[int]] = {}
        self._presence = f"{PRESENCE}{uuid.uuid4().hex}"
        self._wake = threading.Event()
        self._closed = False
        self._busy_until_s = -math.inf
        self._warned = False
        self._thread = threading.Thread(target=self._run, name="gpu-card-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and waits for it."""
        self._closed = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.asking.close()

    def wake(self) -> None:
        """Makes the thread look at the card: a model has arrived, or a move has begun."""
        self._wake.set()

    def status(self) -> SharingStatus:
        now_s, recent = time.monotonic(), self.last_yield
        queue: Tickets = ()
        with contextlib.suppress(BoardBusy):
            queue = alive(self._board.tickets(busy_after_s=0.05), now_s)  # the status does not wait
        return {
            "headroom_bytes": self.headroom_bytes,
            "yields": self.yields,
            "last_yield": None if recent is None else {
                "ago_s": now_s - recent.time_s, "pid": recent.pid, "name": recent.name, "bytes": recent.nbytes,
                "models": list(recent.models),
            },
            "peers": sorted(each.pid for each in queue if each.marks_presence and each.key != self._presence),
            "holders": other_processes(self._device, self._leaving.own_pids()),
            "neighbors": self.asking.status(),
            "queue": [
                {"model": ticket.model, "pid": ticket.pid, "wanted_bytes": ticket.wanted_bytes,
                 "waited_s": now_s - ticket.arrived_s, "claimed": ticket.claimed}
                for ticket in sorted(queue, key=lambda ticket: ticket.arrived_s) if not ticket.marks_presence
            ],
        }  # fmt: skip

    # -- room ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def place(self, arrival: Arrival) -> Iterator[Callable[[int], None]]:
        """See `residency.arrivals.CardShare`."""
        now_s = time.monotonic()
        asked_s = now_s if arrival.asked_s is None else arrival.asked_s
        first = Ticket(uuid.uuid4().hex, arrival.model, os.getpid(), asked_s, 0, now_s)

        def claim(needed_bytes: int) -> None:
            ticket = replace(first, wanted_bytes=needed_bytes)
            self._claims.pop(ticket.key, None)
            self._change(lambda tickets: (enter(tickets, replace(ticket, beat_s=time.monotonic())), None))
            self._wait(ticket, arrival)
            self._claims[ticket.key] = ticket
            self.wake()

        try:
            yield claim
        finally:
            self._claims.pop(first.key, None)
            self._change(lambda tickets: (leave(tickets, first.key), None))

    def _wait(self, ticket: Ticket, arrival: Arrival) -> None:
        pause = threading.Event()
        while not self._claim(ticket, planned=arrival.asked_s is None):
            if arrival.asked_s is None or not arrival.is_wanted():
                raise NoRoomNow
            memory = self._device.memory()
            lacking_bytes = 0 if memory.free_bytes is None else ticket.wanted_bytes - memory.free_bytes
            if lacking_bytes > 0 and self._leaving.leave(lacking_bytes, ticket.arrived_s)[1] > 0:
                self.asking.ask(ticket.wanted_bytes, arrival.is_wanted)
            others = other_processes(self._device, self._leaving.own_pids())
            arrival.waits(ticket.wanted_bytes, shortage(ticket.wanted_bytes, memory.free_bytes, others))
            pause.wait(STEP_EVERY_S)

    def _claim(self, ticket: Ticket, planned: bool) -> bool:
        def act(tickets: Tickets) -> tuple[Tickets, bool]:
            now_s, free_bytes = time.monotonic(), self._device.memory().free_bytes
            if free_bytes is not None and planned:
                free_bytes -= self.headroom_bytes
            return step(tickets, replace(ticket, beat_s=now_s), free_bytes, now_s)

        claimed = self._change(act)
        if claimed is not None:
            return claimed
        free_bytes = self._device.memory().free_bytes  # without the queue
        return free_bytes is None or free_bytes >= ticket.wanted_bytes

    def _change(self, act: Callable[[Tickets], tuple[Tickets, T]]) -> T | None:
        """Changes the tickets; returns None if they cannot be changed now: then this process goes on without them."""
        if time.monotonic() < self._busy_until_s:
            return None
        try:
            return self._board.change(act)
        except BoardBusy as error:
            self._busy_until_s = time.monotonic() + STALE_AFTER_S
            if not self._warned:
                self._warned = True
                logger.warning("The queue for the card is not used: %s", error)
            return None

    # -- watching -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        watches, here_s = False, -math.inf
        while not self._closed:
            self._wake.clear()
            try:
                now_s = time.monotonic()
                if self._leaving.on_card() or self._claims:
                    here_s = now_s
                # Those for which models have left keep their place until they need no more.
                watched, watches = watches, now_s <= here_s + (STALE_AFTER_S if self._strangers.asking else 0)
                if watches:
                    self._look()
                elif watched:
                    self._rest()
                    self.asking.give_back()
            except Exception:
                logger.exception("The watch over the card met an error and goes on")
            self._wake.wait(LOOK_EVERY_S if watches else self.asking.give_back_if_due())
        if watches:
            self._rest()

    def _rest(self) -> None:
        """Ends the watch. Tickets of strangers end by themselves."""
        self._strangers.forget()
        self._change(lambda tickets: (leave(tickets, self._presence), None))

    def _look(self) -> None:
        now_s, free_bytes, own = time.monotonic(), self._device.memory().free_bytes, self._leaving.own_pids()
        holders = [(pid, nbytes) for pid, nbytes in self._device.holders() if pid not in own]
        # In a container the driver may name processes by the host's numbers: then this process may be one of them.
        held = {pid: nbytes for pid, nbytes in holders if nbytes is not None and psutil.pid_exists(pid)}
        self._parents = {pid: self._parents.get(pid) or with_parents(pid) for pid in held}

        def act(tickets: Tickets) -> tuple[Tickets, Tickets]:
            peers = {ticket.pid for ticket in alive(tickets, now_s) if not ticket.is_strangers}
            others = {pid: nbytes for pid, nbytes in held.items() if not self._parents[pid] & peers}
            asked = {ticket.key for ticket in self._strangers.asking.values()}
            if self.headroom_bytes and free_bytes is not None:
                self._strangers.look(others, free_bytes, now_s)
            mine = [replace(ticket, beat_s=now_s, claimed=True) for ticket in list(self._claims.values())]
            mine.append(Ticket(self._presence, "", os.getpid(), now_s, 0, now_s, True))
            for ticket in self._strangers.asking.values():
                asked.discard(ticket.key)
                earlier = next((other for other in tickets if other.key == ticket.key), ticket)
                mine.append(replace(ticket, arrived_s=min(ticket.arrived_s, earlier.arrived_s)))
            for key in asked:  # they need no more
                tickets = leave(tickets, key)
            for ticket in mine:
                tickets = enter(tickets, ticket)
            return tickets, tickets

        tickets = self._change(act) or ()
        if free_bytes is not None:
            self._yield(tickets, free_bytes, bool(holders), now_s)

    def _yield(self, tickets: Tickets, free_bytes: int, has_others: bool, now_s: float) -> None:
        """Leaves for the first in the queue and, if idle and not alone, while less than the headroom is free."""
        first = first_waiting(tickets, now_s)
        if first is not None:
            claimed_bytes = sum(ticket.wanted_bytes for ticket in tickets if ticket.claimed)
            if (lacking_bytes := first.wanted_bytes - (free_bytes - claimed_bytes)) > 0:
                self._leave(lacking_bytes, first)
        if free_bytes < self.headroom_bytes and has_others:
            self._leave(self.headroom_bytes - free_bytes, None)

    def _leave(self, nbytes: int, ticket: Ticket | None) -> None:
        freed, _ = self._leaving.leave(nbytes, ticket.arrived_s if ticket else None)
        if not freed:
            return
        name, pid = (name_of(ticket.pid), ticket.pid) if ticket else ("", None)
        if ticket is None or ticket.is_strangers:
            self.last_yield = Yield(time.monotonic(), pid, name, sum(freed.values()), tuple(freed))
            self.yields += 1
        whom, whom_zh = (f"{name} ({pid})", f"{name}（{pid}）") if ticket else ("other processes", "其他进程")
        logger.info("%s: leaves the card for %s / %s：为 %s 让出显存",
                    ", ".join(freed), whom, "、".join(freed), whom_zh)  # fmt: skip


def sharing_of(card: SharedCard | None) -> SharingStatus | None:
    """Returns the status of a shared card; None for one that is not shared."""
    return None if card is None else card.status()


def asking_of(card: SharedCard | None) -> Asking:
    """Returns the neighbours of a shared card; raises `InvalidInput` for one that is not shared."""
    if card is None:
        raise InvalidInput(
            "the GPU is not shared: start with --gpu-neighbor", "未启用显卡共享：请使用 --gpu-neighbor 启动"
        )
    return card.asking


def share_card(
    sharing: Sharing | None, device: Device, leaving: Leaving, subscribe: Callable[[Callable[[Event], object]], object]
) -> SharedCard | None:
    """Returns the shared use of a device; None if it is not shared, or has no memory of its own.

    ``subscribe``: calls a function with each event of the manager. The folder for the queue is made.
    """
    if sharing is None or sharing == Sharing() or not device.separate:
        return None
    board: Board | PrivateBoard = PrivateBoard()
    if sharing.folder is not None:
        try:
            Path(sharing.folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(
                f"the folder for the queue cannot be made ({error}): give another one (--gpu-share-dir)",
                f"无法创建排队目录（{error}）：请换一个目录（--gpu-share-dir）",
            ) from error
        board = Board(Path(sharing.folder), device.identity)
    asking = Asking(sharing.neighbors, device, leaving.own_pids)
    card = SharedCard(device, leaving, headroom_bytes=sharing.headroom_bytes, board=board, asking=asking)
    subscribe(lambda event: card.wake() if event.what == "began" else None)
    card.start()
    return card
