"""What happens next. Pure decisions from slots and the time: nothing here acts, waits or logs.

For one model, in this order: what was asked for by hand; a broken engine goes; who waits is served, or the model
brought to the device for them; otherwise its policy says where an idle model is. A model in use or on its way is
left alone. Bringing a model to the device needs room there: `room_for` says whose room.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..states import Move, State
from .managed_model import LeaseRequest, ManagedModel


class Serve(enum.Enum):
    """The step that is no move: the request at the head of the queue gets the model."""

    HEAD = "head"


@dataclass(frozen=True)
class Room:
    """Whether a model may go to the device: now, after these moves and others' requests (``wait``), or never."""

    evict: tuple[Move, ...] = ()
    wait: bool = False
    hopeless: bool = False


def move_towards(slot: ManagedModel, target: State, separate: bool) -> Move | None:
    """The move that brings a settled model as far down as ``target`` (HOST or RELEASED); None if it is there.

    Where device and host are one memory (``separate`` is False) there is nothing to offload.
    """
    if slot.at is State.RELEASED or slot.at is target:
        return None
    if target is State.HOST and not separate:
        return None
    return Move(slot.name, slot.at, target)


def next_step(slot: ManagedModel, now_s: float, separate: bool) -> Move | Serve | None:
    """What should happen to this model now, if anything; see the module for the order."""
    if slot.holder is not None or slot.task is not None:
        return None
    if slot.closing:
        return move_towards(slot, State.RELEASED, separate)
    if slot.asked is not None and (move := move_towards(slot, slot.asked, separate)):
        return move
    called_for = slot.head() is not None or slot.wanted
    if slot.broken and (slot.at is State.DEVICE or (slot.at is State.HOST and called_for)):
        return Move(slot.name, slot.at, State.RELEASED)
    if slot.head() is not None and slot.at is State.DEVICE:
        return Serve.HEAD
    if called_for and slot.at is not State.DEVICE:
        return Move(slot.name, slot.at, State.DEVICE)
    return _due_move(slot, now_s, separate)


def next_deadline(slot: ManagedModel, now_s: float, separate: bool) -> float:
    """When `next_step` will next want to be asked, if nothing else happens; ``math.inf`` for never."""
    if slot.task is not None:
        return float(slot.task.give_up_at_s)
    if slot.in_use or slot.idle_since_s is None or slot.at is State.RELEASED:
        return math.inf
    edges = {edge for window in slot.policy.windows() for edge in window} | {slot.policy.idle_timeout_s}
    times = {max(slot.idle_since_s + edge, slot.not_before_s, now_s) for edge in edges}
    return min((time for time in times if time < math.inf and _due_move(slot, time, separate)), default=math.inf)


def _due_move(slot: ManagedModel, now_s: float, separate: bool) -> Move | None:
    if slot.at is State.RELEASED or slot.idle_since_s is None or now_s < slot.not_before_s:
        return None
    windows = slot.policy.windows()
    # A model promised to be warm for longer than the idle timeout keeps that promise.
    if now_s >= slot.idle_since_s + max(slot.policy.idle_timeout_s, windows[-1][1]):
        return move_towards(slot, State.RELEASED, separate)
    begun = any(slot.idle_since_s + start <= now_s < slot.idle_since_s + stop for start, stop in windows[1:])
    if slot.at is State.HOST:
        # The first window keeps a model where it is; later ones bring it back, unless somebody sent it away.
        return Move(slot.name, State.HOST, State.DEVICE) if begun and not slot.sent_away else None
    warm = begun or now_s < slot.idle_since_s + windows[0][1]
    return None if warm else move_towards(slot, State.HOST, separate)


# -- room on the device -----------------------------------------------------------------------------------------


def room_for(slot: ManagedModel, slots: Collection[ManagedModel], budget_bytes: float) -> Room:
    """Whether ``slot`` may go to the device, on which models under management take ``budget_bytes`` at most.

    If there is no room, idle models leave, the one unused for longest first; models in use are waited for. Who waits
    for room is served in the order of arrival over all models: a model whose next request came later counts as idle.
    Models promised to stay (keep-warm -1) do. A restore that no request waits for takes only room that is free, or
    that idle models hold if it was asked for.
    """
    head = slot.head()
    others = [other for other in slots if other is not slot]
    if head is not None and not head.holding and any(_is_short_and_older(other, head) for other in others):
        return Room(wait=True)
    there_bytes = sum(other.size_bytes for other in others if other.on_device)
    short_bytes = max(there_bytes + slot.size_bytes - budget_bytes, slot.lacking_bytes)
    if short_bytes <= 0:
        return Room()
    short_bytes -= sum(other.size_bytes for other in others if _leaving(other))
    if head is None and not slot.wanted:
        return Room(hopeless=True)
    idle = [other for other in others if _may_be_evicted(other, head)]
    evict = _least_recently_used(idle, short_bytes)
    short_bytes -= sum(other.size_bytes for other in evict)
    busy = [other for other in others if head and other not in idle and _will_be_free(other, head, slots)]
    # What is on its way for the first time may take anything.
    if short_bytes > sum(other.size_bytes or (math.inf if other.task else 0) for other in busy):
        return Room(hopeless=True)
    return Room(evict=tuple(map(_eviction, evict)), wait=True)


def over_budget(slots: Collection[ManagedModel], budget_bytes: float) -> list[Move]:
    """Idle models that must leave because a model turned out to be larger than was known."""
    excess_bytes = sum([slot.size_bytes for slot in slots if slot.on_device and not _leaving(slot)]) - budget_bytes
    if excess_bytes <= 0:
        return []
    leave = _least_recently_used([slot for slot in slots if _may_be_evicted(slot, None)], excess_bytes)
    return [_eviction(slot) for slot in leave]


def _eviction(slot: ManagedModel) -> Move:
    # What could not be offloaded a moment ago must go all the same: somebody waits for the room.
    return Move(slot.name, State.DEVICE, State.RELEASED if slot.stuck else State.HOST)


def would_wait_for_itself(request: LeaseRequest, slots: Collection[ManagedModel]) -> bool:
    """Whether this request waits for somebody who waits, maybe over others, for who makes it."""
    return not _in_the_way_of(request.slot, slots).isdisjoint(request.holding)


def _in_the_way_of(slot: ManagedModel, slots: Collection[ManagedModel]) -> set[ManagedModel]:
    """The models that must become free before ``slot`` does, itself included."""
    seen: set[ManagedModel] = set()
    todo = [slot]
    while todo:
        found = todo.pop()
        if found not in seen:
            seen.add(found)
            todo += [other for other in slots for request in other.waiting() if found in request.holding]
    return seen


def _leaving(slot: ManagedModel) -> bool:
    return slot.task is not None and slot.at is State.DEVICE


def _is_short_and_older(slot: ManagedModel, head: LeaseRequest) -> bool:
    mine = slot.head()
    return slot.short and mine is not None and mine.number < head.number


def _may_be_evicted(slot: ManagedModel, head: LeaseRequest | None) -> bool:
    if slot.at is not State.DEVICE or slot.task is not None or slot.holder is not None or slot.stays:
        return False
    mine = slot.head()
    return mine is None or (head is not None and head.number < mine.number and not mine.holding)


def _will_be_free(slot: ManagedModel, head: LeaseRequest, slots: Collection[ManagedModel]) -> bool:
    """Whether a model that is in use, or on its way to the device, can leave without waiting for ``head``."""
    if not slot.on_device or slot.stays or not (slot.in_use or slot.task):
        return False
    first = _in_the_way_of(slot, slots)
    return first.isdisjoint((head.slot, *head.holding)) and not any(other.short for other in first)


def _least_recently_used(idle: Collection[ManagedModel], short_bytes: float) -> list[ManagedModel]:
    """As many of these as hold ``short_bytes`` together, or all of them."""
    leave: list[ManagedModel] = []
    for slot in sorted(idle, key=lambda slot: -math.inf if slot.idle_since_s is None else slot.idle_since_s):
        if short_bytes > 0 and slot.size_bytes > 0:
            leave.append(slot)
            short_bytes -= slot.size_bytes
    return leave


def by_arrival(slots: Iterable[ManagedModel]) -> list[ManagedModel]:
    """Slots in the order in which their next requests came; those without one last."""
    return sorted(slots, key=lambda slot: head.number if (head := slot.head()) else math.inf)
