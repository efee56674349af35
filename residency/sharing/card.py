"""One card, many processes: watches it while a model of this process is on it, and leaves when others need room."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from ..contracts import Device
from ..errors import InvalidInput
from ..observability.events import Event
from ..status_types import SharingStatus
from . import Sharing
from .asking import AGAIN_AFTER_S, Asking
from .board import Board, BoardBusy, PrivateBoard
from .processes import Identity, family_of, identity_of, name_of, other_processes
from .room import PAUSE_S, Leaving, Room
from .strangers import GIVEN_UP_AFTER_S, Strangers
from .tickets import (
    PRESENCE,
    STALE_AFTER_S,
    Ticket,
    Tickets,
    alive,
    claimed_bytes,
    enter,
    leave,
    share_of,
    waiting,
)

logger = logging.getLogger(__name__)

PATIENCE_S = 15.0
"""Time for the models that should leave first, after which all others leave: an offload takes some seconds."""

GIVE_BACK_AFTER_S = 60.0
"""Time after which a neighbour that was asked by hand gets its memory back, and maximum wait for it to be free."""

LOOK_EVERY_S = 0.1
"""Interval of looks at the card while a model of this process is on it that may leave for others."""


@dataclass(frozen=True)
class Yield:
    """Models left the card for another process. ``time_s``: of ``time.monotonic``; ``pid``: None if unknown."""

    time_s: float
    pid: int | None
    name: str
    nbytes: int
    models: tuple[str, ...]


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
        self.asking = asking
        self._device, self._leaving = device, leaving
        self._strangers = Strangers(headroom_bytes)
        self._families: dict[int, frozenset[Identity]] = {}
        self._presence = f"{PRESENCE}{uuid.uuid4().hex}"
        self._room = Room(device, leaving, headroom_bytes, board, asking, self.wake, self._presence)
        self.place = self._room.place
        self._wake = threading.Event()
        self._closed = False
        self._serves_others = headroom_bytes > 0 or isinstance(board, Board)
        #: When neighbours get back what they have given up, unless a model of this process is on the card.
        self._due_s = math.inf
        #: By ticket, and "" for the headroom.
        self._lacks_since_s: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="gpu-card-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, within_s: float = 0) -> None:
        """Ends the thread and waits for it, and for neighbours as `Asking.close`."""
        self._closed = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.asking.close(within_s)

    def wake(self) -> None:
        """Makes the thread look at the card: a model has arrived, a move has begun, or neighbours have been asked."""
        self._wake.set()

    def ask_one(self, url: str) -> None:
        """See `Asking.ask_one`; if no model of this process comes, the neighbour gets its memory back."""
        if not (owed := self.asking.owed_urls()):
            self._due_s = time.monotonic() + GIVE_BACK_AFTER_S
        try:
            self.asking.ask_one(url)
        finally:  # it may have given up its memory although its answer is lost
            if self.asking.owed_urls() - owed:  # else what is due already stays due
                self._due_s = time.monotonic() + GIVE_BACK_AFTER_S
            self.wake()

    def status(self) -> SharingStatus:
        now_s, recent = time.monotonic(), self.last_yield
        queue = alive(self._room.tickets(), now_s)
        # Each app has a ticket of its presence and those of its idle models; two containers may have the same pid.
        here = {(each.key[: len(self._presence)], each.pid) for each in queue if each.marks_presence}
        return {
            "headroom_bytes": self.headroom_bytes,
            "yields": self.yields,
            "last_yield": None if recent is None else {
                "ago_s": now_s - recent.time_s, "pid": recent.pid, "name": recent.name, "bytes": recent.nbytes,
                "models": list(recent.models),
            },
            "peers": sorted(pid for key, pid in here if key != self._presence),
            "holders": other_processes(self._device, self._leaving.own_pids()),
            "neighbors": self.asking.status(),
            "queue": [
                {"model": ticket.model, "pid": ticket.pid, "wanted_bytes": ticket.wanted_bytes,
                 "waited_s": now_s - ticket.arrived_s, "claimed": ticket.claimed}
                for ticket in sorted(queue, key=lambda ticket: ticket.arrived_s) if not ticket.marks_presence
            ],
        }  # fmt: skip

    def _run(self) -> None:
        watches, here_s = False, -math.inf
        while not self._closed:
            self._wake.clear()
            pause_s: float | None = PAUSE_S
            try:
                now_s = time.monotonic()
                if self._leaving.on_card() or self._room.is_moving:
                    here_s = now_s
                # Those for which models have left keep their place until they need no more.
                watched, watches = watches, now_s <= here_s + (STALE_AFTER_S if self._strangers.asking else 0)
                if watches:
                    self._look()
                    pause_s = LOOK_EVERY_S if self._serves_others or self._room.is_moving else AGAIN_AFTER_S
                else:
                    if watched:
                        self._rest()
                        self._due_s = now_s
                    pause_s = self._give_back(now_s)
            except Exception:
                logger.exception("The watch over the card met an error and goes on")
            self._wake.wait(pause_s)
        if watches:
            self._rest()

    def _give_back(self, now_s: float) -> float | None:
        """Gives neighbours back what they have given up, once it is free.

        Returns after how many seconds to call it again; None: not before a neighbour is asked.
        """
        if not self.asking.owes:
            self._due_s = math.inf
            return None
        if self._due_s == math.inf:  # asked for a request that has given up
            self._due_s = now_s
        if now_s < self._due_s:
            return self._due_s - now_s
        if self._may_give_back():
            self.asking.give_back(self._may_give_back)
        return AGAIN_AFTER_S if self.asking.owes else None

    def _may_give_back(self) -> bool:
        now_s = time.monotonic()
        if self._leaving.on_card() or self._room.is_moving:
            return False
        return now_s >= self._due_s + GIVE_BACK_AFTER_S or self._has_room_for_neighbors(now_s)

    def _has_room_for_neighbors(self, now_s: float) -> bool:
        """Returns whether nothing waits or moves in the queue, and as much is free as the neighbours gave up."""
        tickets, free_bytes = self._room.change(lambda tickets: (tickets, tickets)), self._device.memory().free_bytes
        if tickets is None or not all(ticket.marks_presence for ticket in alive(tickets, now_s)):
            return False
        return free_bytes is None or free_bytes >= self.asking.owed_bytes()

    def _rest(self) -> None:
        """Ends the watch. Tickets of strangers end by themselves."""
        self._strangers.forget()
        self._room.change(lambda tickets: (self._without_mine(tickets), None))

    def _without_mine(self, tickets: Tickets) -> Tickets:
        """Returns the tickets without those that mark the presence of this process."""
        return tuple(ticket for ticket in tickets if not ticket.key.startswith(self._presence))

    def _here(self, me: Identity, now_s: float) -> list[Ticket]:
        """Returns the tickets that mark the presence of this process, and of its idle models."""
        pid, started = me
        here = Ticket(self._presence, "", pid, now_s, 0, now_s, True, started=started)
        return [here] + [
            replace(here, key=f"{self._presence}-{model}", arrived_s=idle_since_s, card_bytes=nbytes)
            for model, (idle_since_s, nbytes) in self._leaving.offers().items()
        ]

    def _look(self) -> None:
        now_s, free_bytes, own = time.monotonic(), self._device.memory().free_bytes, self._leaving.own_pids()
        listed, me = self._device.holders(), identity_of(os.getpid())
        self._families = {pid: self._families.get(pid) or family_of(pid) for pid, _ in listed}
        # Also without a worker process that begins to load.
        holders = [(pid, nbytes) for pid, nbytes in listed if pid not in own and me not in self._families[pid]]
        # In a container the driver may name processes by the host's numbers: then some of them are those of this app.
        held = {pid: nbytes for pid, nbytes in holders if nbytes is not None and psutil.pid_exists(pid)}
        named = len(holders) < len(listed)
        own_bytes = self._room.own_bytes() if self._room.is_moving else None  # asks the driver once more
        here = self._here(me, now_s)

        def act(tickets: Tickets) -> tuple[Tickets, Tickets]:
            tickets = self._without_mine(tickets)
            peers = {(ticket.pid, ticket.started) for ticket in alive(tickets, now_s) if not ticket.is_strangers}
            others = {pid: nbytes for pid, nbytes in held.items() if not self._families[pid] & peers}
            asked = {ticket.key for ticket in self._strangers.asking.values()}
            if self.headroom_bytes and free_bytes is not None:
                self._strangers.look(others, free_bytes, now_s)
            mine = [*self._room.running(own_bytes, now_s), *here]
            for ticket in self._strangers.asking.values():
                asked.discard(ticket.key)
                earlier = next((other for other in tickets if other.key == ticket.key), ticket)
                arrived_s = min(ticket.arrived_s, earlier.arrived_s)
                if now_s <= arrived_s + GIVEN_UP_AFTER_S:
                    mine.append(replace(ticket, arrived_s=arrived_s))
                else:  # as the first process that has noticed it says
                    asked.add(ticket.key)
            for key in asked:  # they need no more
                tickets = leave(tickets, key)
            for ticket in mine:
                tickets = enter(tickets, ticket)
            return tickets, tickets

        tickets = self._room.change(act) or ()
        if free_bytes is not None:
            # A driver that lists no process, although this one is there, does not tell (WSL2, some containers).
            own_count = None if named else self._leaving.count_on_card()
            has_others = bool(holders) if named else not listed or own_count is None or len(listed) > own_count
            self._yield(tickets, free_bytes, has_others, now_s)

    def _yield(self, tickets: Tickets, free_bytes: int, has_others: bool, now_s: float) -> None:
        """Leaves for the first in the queue and, if idle and not alone, while less than the headroom is free."""
        first = next((ticket for ticket in waiting(tickets, now_s) if ticket.wanted_bytes), None)
        lacks = list[tuple[int, Ticket | None]]()
        if first is not None:
            lacks.append((first.wanted_bytes - (free_bytes - claimed_bytes(alive(tickets, now_s))), first))
        if has_others:
            lacks.append((self.headroom_bytes - free_bytes, None))
        lacks = [(nbytes, needs) for nbytes, needs in lacks if nbytes > 0]
        keys = [needs.key if needs else "" for _, needs in lacks]
        self._lacks_since_s = {key: self._lacks_since_s.get(key, now_s) for key in keys}
        for key, (nbytes, needs) in zip(keys, lacks, strict=True):
            if now_s < self._lacks_since_s[key] + PATIENCE_S:  # later, others do not give up what they should
                nbytes = share_of(tickets, self._presence, nbytes, needs, now_s)
            if nbytes > 0:
                self._leave(nbytes, needs)

    def _leave(self, nbytes: int, ticket: Ticket | None) -> None:
        freed, _ = self._leaving.leave(nbytes, ticket.arrived_s if ticket else None)
        if not freed:
            return
        name, pid = (name_of(ticket.pid, ticket.started), ticket.pid) if ticket else ("", None)
        if ticket is None or ticket.is_strangers:
            self.last_yield = Yield(time.monotonic(), pid, name, sum(freed.values()), tuple(freed))
            self.yields += 1
        whom, whom_zh = (f"{name} ({pid})", f"{name}（{pid}）") if ticket else ("other processes", "其他进程")
        logger.info("%s: leaves the card for %s / %s：为 %s 让出显存",
                    ", ".join(freed), whom, "、".join(freed), whom_zh)  # fmt: skip


def sharing_of(card: SharedCard | None) -> SharingStatus | None:
    """Returns the status of a shared card; None for one that is not shared."""
    return None if card is None else card.status()


def ask_neighbor(card: SharedCard | None, url: str) -> None:
    """Asks a neighbour of a shared card, see `Asking.ask_one`; raises `InvalidInput` if the card is not shared."""
    if card is None:
        raise InvalidInput(
            "the GPU is not shared: start with --gpu-neighbor", "未启用显卡共享：请使用 --gpu-neighbor 启动"
        )
    card.ask_one(url)


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

    def own_pids() -> set[int]:
        """Returns the processes of this project on the card, which the queue asks."""
        peers: Tickets = ()
        with contextlib.suppress(BoardBusy):
            peers = alive(board.tickets(), time.monotonic())
        return leaving.own_pids() | {ticket.pid for ticket in peers if not ticket.is_strangers}

    asking = Asking(sharing.neighbors, device, own_pids)
    card = SharedCard(device, leaving, headroom_bytes=sharing.headroom_bytes, board=board, asking=asking)
    subscribe(lambda event: card.wake() if event.what in ("began", "done", "failed") else None)
    card.start()
    return card
