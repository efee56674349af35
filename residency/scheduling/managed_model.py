"""A managed model: its state, its requests and what is known of its memory. Pure data: no locks, clock or torch."""

from __future__ import annotations

import contextvars
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from ..errors import Holder, RequestCancelled
from ..observability.history import History
from ..observability.outside_memory import OutsideMemory
from ..one_shot_event import AsyncOneShotEvent, OneShotEvent, set_event
from ..states import MoveRecord, State

if TYPE_CHECKING:
    from ..contracts import KeptPart, Policy, Resident
    from .callers import CallSite
    from .random_state import RandomState

SEARCH_AFTER_S = 2.0
"""How long the code that has a lease may stand still until the manager looks whether it still exists."""


class LeaseRequest:
    """One request for a model, from its arrival to its end; whoever changes it holds the manager's lock.

    ``number`` is its place in the order of arrival over all models. ``site`` is the code that asks, or that last
    resumed the generator in which the model is leased. ``holding`` are the managed models that this code keeps busy:
    models it has leased, or is loading. It is answered once it holds the model (``served_s``) or has an ``error``.
    """

    __slots__ = ("answered", "asked_s", "awaited", "context", "ended", "error", "holding", "latch", "managed", "number",
                 "resumed_s", "searched_s", "served_s", "site", "streams", "users")  # fmt: skip

    def __init__(
        self,
        managed: ManagedModel,
        number: int,
        site: CallSite,
        holding: tuple[ManagedModel, ...] = (),
        asked_s: float = 0.0,
    ) -> None:
        self.managed = managed
        self.number = number
        self.site = site
        self.holding = holding
        self.asked_s = self.served_s = self.resumed_s = asked_s
        #: When garbage was last collected in case that nothing refers to its lease any more.
        self.searched_s = asked_s
        self.answered = False
        self.error: BaseException | None = None
        #: How many nested leases share it; and whether the lease that it was made for has ended.
        self.users = 1
        self.ended = False
        #: Whether a stream holds it: a generator whose steps tell where they are made.
        self.streams = False
        #: Whether the code that has the model was last seen waiting, with a time-out, for the thread that asks here.
        self.awaited = False
        #: What it sleeps on, if it has to wait; and where a load on its behalf runs.
        self.latch: OneShotEvent | None = None
        self.context: contextvars.Context | None = None

    def facts(self, now_s: float) -> Holder:
        """The code that has the model, its thread, and since how many seconds: for errors and the status."""
        waiting = list(self.managed.queue)
        awaited = next((other.site.thread_name for other in waiting if other.awaited and not other.answered), None)
        return Holder(self.site.where, self.site.thread_name, max(0.0, now_s - self.served_s), awaited)

    @property
    def search_s(self) -> float:
        """When to look whether the code that has the lease still exists: at intervals that double."""
        return self.searched_s + max(SEARCH_AFTER_S, self.searched_s - self.resumed_s)

    @property
    def is_abandoned(self) -> bool:
        """Whether a coroutine waits for it whose event loop has ended."""
        return isinstance(self.latch, AsyncOneShotEvent) and self.latch.is_dead

    def answer(self, error: BaseException | None = None) -> None:
        """Served, or (with an error) not; wakes who waits for it."""
        self.error = error
        self.answered = True
        self.context = None  # it remembers who asked before, and so on
        if self.latch is not None:
            set_event(self.latch)


@dataclass(eq=False)
class ManagedModel:
    """The books of one model. Whoever reads or writes it holds the manager's lock.

    ``holder`` is the request in force; ``queue`` holds later requests in order of arrival, and answered ones until they
    reach its head. ``move_task`` is the move under way. ``pending_move`` is the state to reach once the running request
    ends. ``prefetch`` marks a restore that no request waits for. ``prewarmed`` marks a model that was warmed while in
    use: it stays on the device for a while after the last request. Moves leave alone what the paths in ``skip``
    reach. ``borrowed_part`` is the resident of what the loader is given; it outlives a release. Each load begins with
    ``random_state``.
    Times are of the manager's clock, in seconds; bytes are those of the last settled state.
    """

    name: str
    load: Callable[[], Any]
    policy: Policy
    settled_state: State = State.RELEASED
    engine: Any = None
    resident: Resident | None = None
    device_bytes: int = 0
    host_bytes: int = 0
    #: What it takes on the device, as far as is known: what it took there last.
    size_bytes: int = 0
    #: What the device lacked when it last refused this model; models that leave make it less.
    shortfall_bytes: int = 0
    #: What must be free there when it is tried again, where its size is not known.
    needed_bytes: int = 0
    holder: LeaseRequest | None = None
    queue: deque[LeaseRequest] = field(default_factory=deque)
    move_task: Any = None
    pending_move: State | None = None
    prefetch: bool = False
    prewarmed: bool = False
    #: A request of it waits for room on the device.
    waiting_for_room: bool = False
    #: Somebody sent it away by hand: it is not brought back before somebody asks for it.
    moved_away_by_hand: bool = False
    #: It could not be offloaded: if others need its room, it is released.
    cannot_offload: bool = False
    #: It cannot be used or moved any more: the next request has it loaded from scratch.
    broken: bool = False
    closing: bool = False
    skip: tuple[str, ...] = ()
    random_state: RandomState | None = None
    borrowed_part: KeptPart | None = None
    load_timeout_s: float = math.inf
    max_waiting: float = math.inf
    #: When its last request ended; and since when it is idle, which a restore that nobody used begins anew.
    request_ended_s: float | None = None
    idle_since_s: float | None = None
    policy_paused_until_s: float = -math.inf
    #: How long it has been on its way to the device, all arrivals that have ended together.
    restored_for_s: float = 0.0
    last_move: MoveRecord | None = None
    last_error: str | None = None
    #: What it holds beyond these books, as far as is known; None before it was first moved.
    outside_memory: OutsideMemory | None = None
    #: That it holds something outside, or nothing that can move, has been said.
    outside_reported: bool = False
    history: History = field(default_factory=History)
    watchers: list[threading.Lock] = field(default_factory=list)

    @property
    def state(self) -> State:
        """Where it is (``settled_state``), or which way it travels."""
        return self.settled_state if self.move_task is None else cast(State, self.move_task.move.via)

    @property
    def on_device(self) -> bool:
        """Whether it takes room on the device, or soon will."""
        return self.settled_state is State.DEVICE or (
            self.move_task is not None and self.move_task.move.target is State.DEVICE
        )

    def arrived_for_s(self, now_s: float) -> float:
        """How long it has been on its way to the device until now, all arrivals together."""
        arrives = self.move_task is not None and self.move_task.arrives
        return self.restored_for_s + (max(0.0, now_s - self.move_task.started_s) if arrives else 0.0)

    @property
    def stays(self) -> bool:
        """Whether it was promised to stay on the device (keep-warm -1), and so makes no room for others."""
        return self.policy.keep_warm_s == math.inf

    def next_request(self) -> LeaseRequest | None:
        """The request that is served next; drops those that were answered (cancelled, refused) or abandoned."""
        while self.queue:
            first = self.queue[0]
            if first.is_abandoned and not first.answered:
                first.answer(RequestCancelled(self.name))
            if not first.answered:
                return first
            self.queue.popleft()
        return None

    def held_by(self, now_s: float) -> Holder | None:
        """The code that has the model, if a request is in force. Needs no lock."""
        holder = self.holder
        return holder.facts(now_s) if holder is not None and holder.users else None

    @property
    def in_use(self) -> bool:
        """Whether a request holds the model or waits for it."""
        return self.holder is not None or self.next_request() is not None

    def notify_watchers(self) -> None:
        """Wake those who watch for a change of these books."""
        watchers, self.watchers = self.watchers, []
        for latch in watchers:
            set_event(latch)

    def waiting(self) -> Iterator[LeaseRequest]:
        """The requests that wait, in order of arrival."""
        return (request for request in self.queue if not request.answered)
