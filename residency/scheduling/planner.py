"""Decides the next move from the managed models and the time. Pure: no actions, waits or logs.

The order for one model: a move by hand; the release of a broken engine; serving the next request, or moving the model
to the device for it; otherwise the policy decides where an idle model is. A model in use or in a move is left alone.
`room_for` decides which other models leave for a model.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..states import Move, State
from .managed_model import LeaseRequest, ManagedModel


class Serve(enum.Enum):
    """The step without a move: the first request of the queue gets the model."""

    HEAD = "head"


@dataclass(frozen=True)
class Room:
    """Whether a model may move to the device: now, after these moves and others' requests (``wait``), or never."""

    evict: tuple[Move, ...] = ()
    wait: bool = False
    hopeless: bool = False


def move_towards(managed: ManagedModel, target: State, separate: bool) -> Move | None:
    """Returns the move of a settled model down to ``target`` (HOST or RELEASED); None if it is there or below.

    If device and host are one memory (``separate`` is False), offloads do not exist.
    """
    if managed.settled_state is State.RELEASED or managed.settled_state is target:
        return None
    if target is State.HOST and not separate:
        return None
    return Move(managed.name, managed.settled_state, target)


def next_step(managed: ManagedModel, now_s: float, separate: bool) -> Move | Serve | None:
    """Returns the model's next step, or None; see the module for the order."""
    if managed.leases.holder is not None or managed.move_task is not None:
        return None
    if managed.wishes.retiring:
        return move_towards(managed, State.RELEASED, separate)
    wanted = managed.wishes.pending_move
    if wanted is not None and (move := move_towards(managed, wanted, separate)):
        return move
    waits = managed.leases.next_request() is not None
    called_for = waits or managed.wishes.prefetch
    if managed.faults.broken and (
        managed.settled_state is State.DEVICE or (managed.settled_state is State.HOST and called_for)
    ):
        return Move(managed.name, managed.settled_state, State.RELEASED)
    if waits and managed.settled_state is State.DEVICE:
        return Serve.HEAD
    if called_for and managed.settled_state is not State.DEVICE:
        return Move(managed.name, managed.settled_state, State.DEVICE)
    return _due_move(managed, now_s, separate)


def next_deadline(managed: ManagedModel, now_s: float, separate: bool) -> float:
    """Returns when `next_step` must be called next if nothing else changes; ``math.inf`` for never."""
    if managed.move_task is not None:
        return float(managed.move_task.give_up_at_s)
    if managed.leases.in_use or managed.times.idle_since_s is None or managed.settled_state is State.RELEASED:
        return math.inf
    earliest_s, deadline_s = max(now_s, managed.times.policy_paused_until_s), math.inf
    for edges in (*managed.windows(), (managed.policy.idle_timeout_s,)):
        for edge_s in edges:
            time_s = max(managed.times.idle_since_s + edge_s, earliest_s)
            if time_s < deadline_s and _due_move(managed, time_s, separate):
                deadline_s = time_s
    return deadline_s


def _due_move(managed: ManagedModel, now_s: float, separate: bool) -> Move | None:
    since_s = managed.times.idle_since_s
    if managed.settled_state is State.RELEASED or since_s is None or now_s < managed.times.policy_paused_until_s:
        return None
    windows = managed.windows()
    # Keep-warm takes precedence over a shorter idle timeout.
    if now_s >= since_s + max(managed.policy.idle_timeout_s, windows[-1][1]):
        return move_towards(managed, State.RELEASED, separate)
    begun = any(since_s + start_s <= now_s < since_s + stop_s for start_s, stop_s in windows[1:])
    if managed.settled_state is State.HOST:
        # The first window restores no model; later ones do, unless it was moved away by hand.
        return Move(managed.name, State.HOST, State.DEVICE) if begun and not managed.wishes.moved_away_by_hand else None
    warm = begun or now_s < since_s + windows[0][1]
    return None if warm else move_towards(managed, State.HOST, separate)


def will_not_reach(managed: ManagedModel, state: State) -> bool:
    """Returns whether a model cannot reach ``state`` without a new request."""
    failed = (
        managed.faults.last_error is not None
        and managed.settled_state is not State.DEVICE
        and not managed.wishes.prefetch
        and not managed.leases.in_use
    )
    return managed.move_task is None and (managed.wishes.retiring or (failed and state is not State.RELEASED))


# -- room on the device -----------------------------------------------------------------------------------------


def room_for(managed: ManagedModel, managed_models: Collection[ManagedModel], budget_bytes: float) -> Room:
    """Returns whether ``managed`` may move to the device, where managed models use at most ``budget_bytes``.

    If there is no room, idle models leave, least recently used first, and models in use are waited for. Requests that
    wait for room are served in order of arrival over all models: a model whose next request is later counts as idle.
    Models with keep-warm -1 stay. Without a waiting request, a restore uses only free room or, if prefetched, that of
    idle models.
    """
    head = managed.leases.next_request()
    others = [other for other in managed_models if other is not managed]
    if head is not None and not head.holding and any(_is_short_and_older(other, head) for other in others):
        return Room(wait=True)
    there_bytes = sum(other.memory.size_bytes for other in others if other.on_device)
    short_bytes = max(there_bytes + managed.memory.size_bytes - budget_bytes, managed.memory.shortfall_bytes)
    if short_bytes <= 0:
        return Room()
    short_bytes -= sum(other.memory.size_bytes for other in others if _leaving(other))
    if head is None and not managed.wishes.prefetch:
        return Room(hopeless=True)
    idle = [other for other in others if _may_be_evicted(other, head)]
    evict = _least_recently_used(idle, short_bytes)
    short_bytes -= sum(other.memory.size_bytes for other in evict)
    busy = [other for other in others if head and other not in idle and _will_be_free(other, head, managed_models)]
    # The size of a model in its first load is unknown.
    if short_bytes > sum(other.memory.size_bytes or (math.inf if other.move_task else 0) for other in busy):
        return Room(hopeless=True)
    return Room(evict=tuple(map(_eviction, evict)), wait=True)


def over_budget(managed_models: Collection[ManagedModel], budget_bytes: float) -> list[Move]:
    """Returns the moves of idle models that must leave after a model turned out to be larger than expected."""
    staying = [managed for managed in managed_models if managed.on_device and not _leaving(managed)]
    excess_bytes = sum([managed.memory.size_bytes for managed in staying]) - budget_bytes
    if excess_bytes <= 0:
        return []
    idle = [managed for managed in staying if _may_be_evicted(managed, None)]
    return [_eviction(managed) for managed in _least_recently_used(idle, excess_bytes)]


def _eviction(managed: ManagedModel) -> Move:
    # After a failed offload the model is released, since a request waits for the room.
    return Move(managed.name, State.DEVICE, State.RELEASED if managed.faults.cannot_offload else State.HOST)


def would_wait_for_itself(request: LeaseRequest, managed_models: Collection[ManagedModel]) -> bool:
    """Returns whether the request waits, directly or through others, for the code that makes it."""
    return not _in_the_way_of(request.managed, managed_models).isdisjoint(request.holding)


def _in_the_way_of(managed: ManagedModel, managed_models: Collection[ManagedModel]) -> set[ManagedModel]:
    """Returns the models that must become free before ``managed``, including itself."""
    seen: set[ManagedModel] = set()
    todo = [managed]
    while todo:
        found = todo.pop()
        if found not in seen:
            seen.add(found)
            todo += [each for each in managed_models for request in each.leases.waiting() if found in request.holding]
    return seen


def _leaving(managed: ManagedModel) -> bool:
    return managed.move_task is not None and managed.settled_state is State.DEVICE


def _is_short_and_older(managed: ManagedModel, head: LeaseRequest) -> bool:
    mine = managed.leases.next_request()
    return managed.memory.waiting_for_room and mine is not None and mine.number < head.number


def _may_be_evicted(managed: ManagedModel, head: LeaseRequest | None) -> bool:
    settled_there = managed.settled_state is State.DEVICE and managed.move_task is None
    if not settled_there or managed.leases.holder is not None or managed.stays:
        return False
    mine = managed.leases.next_request()
    return mine is None or (head is not None and head.number < mine.number and not mine.holding)


def _will_be_free(managed: ManagedModel, head: LeaseRequest, managed_models: Collection[ManagedModel]) -> bool:
    """Returns whether a model in use, or moving to the device, can leave without waiting for ``head``."""
    if not managed.on_device or managed.stays or not (managed.leases.in_use or managed.move_task):
        return False
    first = _in_the_way_of(managed, managed_models)
    return first.isdisjoint((head.managed, *head.holding)) and not any(other.memory.waiting_for_room for other in first)


def _least_recently_used(idle: Collection[ManagedModel], short_bytes: float) -> list[ManagedModel]:
    """Returns the least recently used models that hold ``short_bytes`` together, or all of them."""

    def idle_since_s(managed: ManagedModel) -> float:
        return -math.inf if managed.times.idle_since_s is None else managed.times.idle_since_s

    leave: list[ManagedModel] = []
    for managed in sorted(idle, key=idle_since_s):
        if short_bytes > 0 and managed.memory.size_bytes > 0:
            leave.append(managed)
            short_bytes -= managed.memory.size_bytes
    return leave


def by_arrival(managed_models: Iterable[ManagedModel]) -> list[ManagedModel]:
    """Returns the models in order of arrival of their next requests; those without one last."""

    def arrival(managed: ManagedModel) -> float:
        return head.number if (head := managed.leases.next_request()) else math.inf

    return sorted(managed_models, key=arrival)
