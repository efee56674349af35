"""A managed model: its state, requests and memory. Data, without locks, clock or torch."""

from __future__ import annotations

import contextvars
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from ..errors import Holder, RequestCancelled
from ..locks import AsyncOneShotEvent, OneShotEvent, set_event
from ..observability.history import History, PastMove
from ..observability.outside_memory import OutsideMemory
from ..receipts import Waited
from ..states import State

if TYPE_CHECKING:
    from ..contracts import Policy
    from ..memory import BorrowedPart, Resident
    from ..random_state import RandomState
    from .callers import CallSite

SEARCH_AFTER_S = 2.0
"""How long the code with a lease may pause until the manager checks whether it still exists."""


@dataclass(eq=False, slots=True)
class LeaseRequest:
    """One request for a model, from its arrival to its end. Changed under the dispatcher's lock.

    Attributes:
        number: its place in the order of arrival over all models.
        site: the code that takes the lease, or that last resumed the generator with the lease.
        holding: the models that this code has leased or is loading.
        searched_s: time of the last check whether its lease is lost.
        answered: it holds the model (since ``served_s``), or has an ``error``.
        ended: its own lease has ended.
        streams: a generator holds it, and reports the code of its steps.
        awaited: the holder was last seen waiting, with a time-out, for the thread of this request.
        users: number of nested leases that share it.
        event: the one-shot event on which it waits, if any.
        context: the context of a load for it.
        keep_warm_s: how long the model stays on the device after it; None: as the policy says.
        arrival, arrival_s: the move that brought the model while it waited, and its seconds within the wait.
        waited: its receipt; None until it holds the model.
    """

    managed: ManagedModel
    number: int
    site: CallSite
    holding: tuple[ManagedModel, ...] = ()
    asked_s: float = 0.0
    served_s: float = 0.0
    resumed_s: float = 0.0
    searched_s: float = 0.0
    answered: bool = False
    ended: bool = False
    streams: bool = False
    awaited: bool = False
    users: int = 1
    error: BaseException | None = None
    event: OneShotEvent | None = None
    context: contextvars.Context | None = None
    keep_warm_s: float | None = None
    arrival: Literal["load", "restore"] | None = None
    arrival_s: float = 0.0
    waited: Waited | None = None

    def facts(self, now_s: float) -> Holder:
        """Returns the code that holds the model, its thread, and for how many seconds; for errors and the status."""
        waiting = list(self.managed.leases.requests)
        awaited = next((other.site.thread_name for other in waiting if other.awaited and not other.answered), None)
        return Holder(self.site.where, self.site.thread_name, max(0.0, now_s - self.served_s), awaited)

    @property
    def search_s(self) -> float:
        """Time of the next check whether the code with the lease still exists; the intervals double."""
        return self.searched_s + max(SEARCH_AFTER_S, self.searched_s - self.resumed_s)

    @property
    def is_abandoned(self) -> bool:
        """Whether its waiting coroutine belongs to an event loop that has ended."""
        return isinstance(self.event, AsyncOneShotEvent) and self.event.is_dead

    def answer(self, error: BaseException | None = None) -> None:
        """Grants the request, or refuses it with ``error``, and wakes its thread or task."""
        self.error = error
        self.answered = True
        self.context = None  # it refers to earlier requests, whose contexts would form a chain
        if self.event is not None:
            set_event(self.event)


@dataclass(slots=True)
class LeaseQueue:
    """The ``holder`` of the model and later ``requests`` in order of arrival. Drops answered requests at the front."""

    holder: LeaseRequest | None = None
    requests: deque[LeaseRequest] = field(default_factory=deque)
    max_waiting: float = math.inf

    def next_request(self) -> LeaseRequest | None:
        """Returns the next request; drops answered (cancelled, refused) and abandoned ones before it."""
        while self.requests:
            first = self.requests[0]
            if first.is_abandoned and not first.answered:
                first.answer(RequestCancelled(first.managed.name))
            if not first.answered:
                return first
            self.requests.popleft()
        return None

    @property
    def in_use(self) -> bool:
        """Whether a request holds the model or waits for it."""
        return self.holder is not None or self.next_request() is not None

    def waiting(self) -> Iterator[LeaseRequest]:
        """Returns the waiting requests, in order of arrival."""
        return (request for request in self.requests if not request.answered)

    def count_waiting(self) -> int:
        return sum(1 for _ in self.waiting())

    def refuse_all(self, error: BaseException) -> None:
        for request in list(self.waiting()):
            request.answer(error)

    def held_by(self, now_s: float) -> Holder | None:
        """Returns the code that holds the model, or None. Needs no lock."""
        holder = self.holder
        return holder.facts(now_s) if holder is not None and holder.users else None


@dataclass(slots=True)
class MemoryUse:
    """Bytes in the last settled state, and shortfall on the device.

    Attributes:
        size_bytes: its size on the device when it was last there, or as registered; 0 if unknown.
        shortfall_bytes: shortfall of the device at the last out-of-memory error; reduced as other models leave.
        needed_bytes: free bytes needed for the next attempt after an out-of-memory error; 0 after none.
        waiting_for_room: a request of it waits for room on the device.
        outside: memory of the process beyond these bytes; None before the first move.
        outside_reported: a warning about memory that no move frees was logged.
    """

    device_bytes: int = 0
    host_bytes: int = 0
    size_bytes: int = 0
    shortfall_bytes: int = 0
    needed_bytes: int = 0
    waiting_for_room: bool = False
    outside: OutsideMemory | None = None
    outside_reported: bool = False


@dataclass(slots=True)
class Wishes:
    """Requested moves that have not begun.

    Attributes:
        pending_move: target state after the running request.
        prefetch: a move to the device that no request waits for.
        prewarmed: warmed while in use; the model stays on the device for a while after the last request.
        moved_away_by_hand: offloaded on demand; the policy does not restore it.
        retiring: unregistered, or its manager is being closed; takes no more requests.
    """

    pending_move: State | None = None
    prefetch: bool = False
    prewarmed: bool = False
    moved_away_by_hand: bool = False
    retiring: bool = False


@dataclass(slots=True)
class Faults:
    """``broken``: the next request loads the engine anew. ``cannot_offload``: eviction releases it.

    ``last_error``: text of the last move's error.
    """

    broken: bool = False
    cannot_offload: bool = False
    last_error: str | None = None


@dataclass(slots=True)
class Times:
    """Seconds of the manager's clock.

    ``request_ended_s``: end of the last request, until the policy has learned the gap after it. ``idle_since_s``: the
    same, or the end of a restore that no request used. ``arriving_s``: total duration of ended moves to the device.
    ``left_after_s``: idle seconds after which it left the device earlier than its last request asked; 0: it did not.
    """

    request_ended_s: float | None = None
    idle_since_s: float | None = None
    policy_paused_until_s: float = -math.inf
    arriving_s: float = 0.0
    left_after_s: float = 0.0


@dataclass(eq=False)
class ManagedModel:
    """The state of one model. Read and written under the dispatcher's lock.

    During a move ``engine`` and ``resident`` belong to ``move_task``. ``skip``: paths to objects that are not moved.
    Each load begins with ``random_state``. ``last_move``: the last one that succeeded. ``last_wait``: of the last
    request that got the model. ``asked_warm_s``: keep-warm of that request in place of the policy's, until the next.
    """

    name: str
    load: Callable[[], Any]
    policy: Policy
    settled_state: State = State.RELEASED
    engine: Any = None
    resident: Resident | None = None
    move_task: Any = None
    skip: tuple[str, ...] = ()
    random_state: RandomState | None = None
    borrowed_part: BorrowedPart | None = None
    load_timeout_s: float = math.inf
    last_move: PastMove | None = None
    last_wait: Waited | None = None
    asked_warm_s: float | None = None
    leases: LeaseQueue = field(default_factory=LeaseQueue)
    memory: MemoryUse = field(default_factory=MemoryUse)
    wishes: Wishes = field(default_factory=Wishes)
    faults: Faults = field(default_factory=Faults)
    times: Times = field(default_factory=Times)
    history: History = field(default_factory=History)
    watchers: list[threading.Lock] = field(default_factory=list)

    @property
    def state(self) -> State:
        """``settled_state``, or the moving state during a move."""
        return self.settled_state if self.move_task is None else cast(State, self.move_task.move.via)

    @property
    def on_device(self) -> bool:
        """Whether it uses memory of the device, or soon will."""
        return self.settled_state is State.DEVICE or self.arrives

    @property
    def arrives(self) -> bool:
        """Whether it is moving to the device."""
        return self.move_task is not None and self.move_task.move.target is State.DEVICE

    @property
    def keep_warm_s(self) -> float:
        """The time on the device after a request, as the last request or else the policy says."""
        return self.policy.keep_warm_s if self.asked_warm_s is None else self.asked_warm_s

    @property
    def stays(self) -> bool:
        """Whether it must stay on the device (the policy's keep-warm is -1), and so is never evicted."""
        return self.policy.keep_warm_s == self.keep_warm_s == math.inf

    def windows(self) -> tuple[tuple[float, float], ...]:
        """Returns the policy's windows, or one with the keep-warm of the last request.

        If the model left earlier, for others or by hand, its idle timeout begins then.
        """
        if self.asked_warm_s is None:
            return self.policy.windows()
        if self.settled_state is State.DEVICE:
            return ((0.0, self.asked_warm_s),)
        return ((0.0, self.times.left_after_s + self.policy.idle_timeout_s),)

    def grant(self, now_s: float) -> LeaseRequest:
        """Gives the model to its next request, and returns it."""
        request = self.leases.next_request()
        assert request is not None
        request.served_s = request.resumed_s = request.searched_s = now_s
        request.waited = self.last_wait = (now_s - request.asked_s, request.arrival, request.arrival_s)
        self.asked_warm_s = request.keep_warm_s
        self.leases.holder = request
        request.answer()
        return request

    def is_settled(self) -> bool:
        """Returns whether no move is running."""
        return self.move_task is None

    def is_idle(self) -> bool:
        """Returns whether no move is running, and no request holds the model or waits for it."""
        return self.move_task is None and not self.leases.in_use

    def arrived_for_s(self, now_s: float) -> float:
        """Returns the total duration of its moves to the device until now."""
        moving = self.arrives and self.move_task.waits is None
        return self.times.arriving_s + (max(0.0, now_s - self.move_task.started_s) if moving else 0.0)

    def notify_watchers(self) -> None:
        """Wakes the threads that wait for a change of this model."""
        watchers, self.watchers = self.watchers, []
        for event in watchers:
            set_event(event)
