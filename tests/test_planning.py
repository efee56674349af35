"""Decisions, without a manager: a slot and a time go in, a move comes out."""

from __future__ import annotations

import math
import threading

import pytest

from residency.planning import next_deadline, next_step
from residency.policies import FixedPolicy
from residency.states import TRANSITIONS, Move, Request, Slot, State


def slot(state: State, keep_warm_s: float = 10, idle_timeout_s: float = 100, **fields: object) -> Slot:
    made = Slot("m", lambda: None, FixedPolicy(keep_warm_s, idle_timeout_s), threading.Condition(), state)
    made.idle_since_s = 0.0
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("state", "now_s", "target"),
    [
        (State.DEVICE, 9.99, None),
        (State.DEVICE, 10, State.HOST),
        (State.DEVICE, 100, State.RELEASED),
        (State.HOST, 99.99, None),
        (State.HOST, 100, State.RELEASED),
        (State.RELEASED, 1e9, None),
        (State.LOADING, 1e9, None),
        (State.OFFLOADING, 1e9, None),
    ],
)
def test_the_ladder(state: State, now_s: float, target: State | None) -> None:
    move = next_step(slot(state), now_s, separate=True)
    assert move == (Move("m", state, target) if target else None)


@pytest.mark.parametrize("fields", [{"holder": object()}, {"queue": [object()]}])
def test_a_model_in_use_is_never_due(fields: dict) -> None:
    busy = slot(State.DEVICE, **fields)
    assert next_step(busy, 1e9, separate=True) is None
    assert next_deadline(busy, separate=True) == math.inf


def test_what_was_asked_for_comes_before_those_who_wait_but_not_before_the_holder() -> None:
    waiting = slot(State.DEVICE, queue=[object()], asked=State.HOST)
    assert next_step(waiting, 0, separate=True) == Move("m", State.DEVICE, State.HOST)
    waiting.holder = object()
    assert next_step(waiting, 0, separate=True) is None


def test_what_was_asked_for_and_is_there_already_does_not_stop_the_ladder() -> None:
    assert next_step(slot(State.HOST, asked=State.HOST), 100, separate=True) == Move("m", State.HOST, State.RELEASED)


def test_a_promise_to_stay_warm_outlasts_the_idle_timeout() -> None:
    pinned = slot(State.DEVICE, keep_warm_s=math.inf)
    assert next_step(pinned, 1e9, separate=True) is None
    long_warm = slot(State.DEVICE, keep_warm_s=200)
    assert next_step(long_warm, 199, separate=True) is None
    assert next_step(long_warm, 200, separate=True) == Move("m", State.DEVICE, State.RELEASED)


def test_one_memory_is_never_offloaded_but_released() -> None:
    model = slot(State.DEVICE)
    assert next_step(model, 50, separate=False) is None
    assert next_deadline(model, separate=False) == 100
    assert next_step(model, 100, separate=False) == Move("m", State.DEVICE, State.RELEASED)


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("not_before_s", [-math.inf, 50.0, 500.0])
@pytest.mark.parametrize("separate", [True, False])
def test_a_deadline_is_exactly_when_a_move_becomes_due(state: State, not_before_s: float, separate: bool) -> None:
    model = slot(state, not_before_s=not_before_s)
    deadline = next_deadline(model, separate)
    if deadline == math.inf:
        assert next_step(model, 1e9, separate) is None
    else:
        assert next_step(model, math.nextafter(deadline, -math.inf), separate) is None
        assert next_step(model, deadline, separate) is not None


def test_every_move_starts_and_ends_settled_and_passes_through_a_moving_state() -> None:
    for (source, target), via in TRANSITIONS.items():
        assert source.settled
        assert target.settled
        assert not via.settled
    with pytest.raises(KeyError):
        _ = Move("m", State.RELEASED, State.HOST).via
