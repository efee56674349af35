"""Which move is next. Pure decisions from a slot and the time: nothing here acts, waits or logs."""

from __future__ import annotations

import math

from .states import Move, Slot, State


def move_towards(slot: Slot, target: State, separate: bool) -> Move | None:
    """The move that brings a settled model as far down as ``target`` (HOST or RELEASED); None if it is there.

    Where device and host are one memory (``separate`` is False) there is nothing to offload.
    """
    if slot.state is State.RELEASED or slot.state is target:
        return None
    if target is State.HOST and not separate:
        return None
    return Move(slot.name, slot.state, target)


def due_move(slot: Slot, now_s: float, separate: bool) -> Move | None:
    """What should happen to this model now, if anything.

    Never moves a model that is leased or already moving. What was asked for by hand comes first, even before
    requests that wait (they bring the model back); keep-warm and idle timeout only when nobody waits.
    """
    if slot.holder is not None or not slot.state.settled:
        return None
    if slot.asked is not None and (move := move_towards(slot, slot.asked, separate)):
        return move
    if now_s >= _release_at(slot):
        return move_towards(slot, State.RELEASED, separate)
    if now_s >= _offload_at(slot, separate):
        return move_towards(slot, State.HOST, separate)
    return None


def next_deadline(slot: Slot, separate: bool) -> float:
    """When `due_move` will next want to be asked, if nothing else happens; ``math.inf`` for never."""
    if slot.holder is not None or not slot.state.settled:
        return math.inf
    return min(_release_at(slot), _offload_at(slot, separate))


def _offload_at(slot: Slot, separate: bool) -> float:
    if slot.state is not State.DEVICE or not separate:
        return math.inf
    return _after_idle(slot, slot.policy.keep_warm_s)


def _release_at(slot: Slot) -> float:
    if slot.state is State.RELEASED:
        return math.inf
    # A model promised to stay warm for longer than the idle timeout keeps that promise.
    return _after_idle(slot, max(slot.policy.idle_timeout_s, slot.policy.keep_warm_s))


def _after_idle(slot: Slot, seconds: float) -> float:
    if slot.queue or slot.idle_since_s is None:
        return math.inf
    return max(slot.idle_since_s + seconds, slot.not_before_s)
