"""Decisions, without a manager: managed models and a time go in, a step comes out."""

from __future__ import annotations

import contextvars
import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residency.scheduling.callers import call_site
from residency.scheduling.managed_model import LeaseRequest, ManagedModel
from residency.scheduling.planner import (
    Room,
    Serve,
    by_arrival,
    move_towards,
    next_deadline,
    next_step,
    over_budget,
    room_for,
    would_wait_for_itself,
)
from residency.scheduling.policies import FixedPolicy
from residency.states import TRANSITIONS, Move, State

HERE = call_site()
SETTLED = [State.RELEASED, State.DEVICE, State.HOST]


@dataclass(frozen=True)
class Windows:
    """A policy with windows of its own."""

    spans: tuple[tuple[float, float], ...]
    idle_timeout_s: float = 100.0
    name: str = "windows"
    keep_warm_s: float = field(default=0.0)

    def windows(self) -> tuple[tuple[float, float], ...]:
        return self.spans

    def idle_ended(self, idle_s: float) -> None: ...

    def brought_back(self, seconds: float) -> None: ...


def managed(
    state: State, keep_warm_s: float = 10, idle_timeout_s: float = 100, name: str = "m", **fields: object
) -> ManagedModel:
    made = ManagedModel(name, lambda: None, FixedPolicy(keep_warm_s, idle_timeout_s), state)
    made.times.idle_since_s = 0.0
    for key, value in fields.items():
        groups = (made.memory, made.wishes, made.faults, made.times, made)
        setattr(next(group for group in groups if hasattr(group, key)), key, value)
    return made


def ask(model: ManagedModel, number: int = 1, holding: tuple[ManagedModel, ...] = ()) -> LeaseRequest:
    request = LeaseRequest(model, number, HERE, holding)
    model.leases.requests.append(request)
    return request


def hold(model: ManagedModel, number: int = 0) -> ManagedModel:
    model.leases.holder = LeaseRequest(model, number, HERE)
    model.leases.holder.answered = True
    return model


def moving(model: ManagedModel, target: State, give_up_at_s: float = math.inf) -> ManagedModel:
    model.move_task = SimpleNamespace(move=Move(model.name, model.settled_state, target), give_up_at_s=give_up_at_s)
    return model


# -- the ladder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "now_s", "target"),
    [
        (State.DEVICE, 9.99, None),
        (State.DEVICE, 10, State.HOST),
        (State.DEVICE, 99.99, State.HOST),
        (State.DEVICE, 100, State.RELEASED),
        (State.HOST, 0, None),
        (State.HOST, 99.99, None),
        (State.HOST, 100, State.RELEASED),
        (State.RELEASED, 1e9, None),
    ],
)
def test_the_ladder(state: State, now_s: float, target: State | None) -> None:
    move = next_step(managed(state), now_s, separate=True)
    assert move == (Move("m", state, target) if target else None)


def test_a_model_that_was_never_used_stays_where_it_is() -> None:
    assert next_step(managed(State.DEVICE, idle_since_s=None), 1e9, separate=True) is None
    assert next_deadline(managed(State.DEVICE, idle_since_s=None), 0, separate=True) == math.inf


@pytest.mark.parametrize(("state", "target"), TRANSITIONS)
def test_a_model_on_its_way_is_left_alone(state: State, target: State) -> None:
    model = moving(managed(state, pending_move=State.RELEASED, broken=True, retiring=True, prefetch=True), target)
    ask(model)
    assert model.state is TRANSITIONS[state, target]
    assert next_step(model, 1e9, separate=True) is None


@pytest.mark.parametrize("fields", [{}, {"pending_move": State.RELEASED}, {"broken": True}, {"retiring": True}])
def test_a_model_in_use_is_left_alone(fields: dict) -> None:
    busy = hold(managed(State.DEVICE, **fields))
    ask(busy)
    assert next_step(busy, 1e9, separate=True) is None
    assert next_deadline(busy, 0, separate=True) == math.inf


def test_who_waits_is_served_or_the_model_brought() -> None:
    here, there, nowhere = managed(State.DEVICE), managed(State.HOST), managed(State.RELEASED)
    for model in (here, there, nowhere):
        ask(model)
        assert next_deadline(model, 0, separate=True) == math.inf
    assert next_step(here, 1e9, separate=True) is Serve.HEAD
    assert next_step(there, 1e9, separate=True) == Move("m", State.HOST, State.DEVICE)
    assert next_step(nowhere, 1e9, separate=True) == Move("m", State.RELEASED, State.DEVICE)


def test_who_was_answered_meanwhile_waits_no_more() -> None:
    model = managed(State.HOST)
    gone, here = ask(model, 1), ask(model, 2)
    gone.answer(TimeoutError())
    assert list(model.leases.waiting()) == [here]
    assert model.leases.next_request() is here
    assert list(model.leases.requests) == [here]
    here.answer(TimeoutError())
    assert not model.leases.in_use
    assert next_step(model, 0, separate=True) is None


def test_what_was_asked_for_comes_before_those_who_wait() -> None:
    waiting = managed(State.DEVICE, pending_move=State.HOST)
    ask(waiting)
    assert next_step(waiting, 0, separate=True) == Move("m", State.DEVICE, State.HOST)


def test_what_was_asked_for_and_is_there_already_does_not_stop_the_ladder() -> None:
    assert next_step(managed(State.HOST, pending_move=State.HOST), 100, separate=True) == Move(
        "m", State.HOST, State.RELEASED
    )


def test_a_model_that_closes_is_released_and_serves_nobody() -> None:
    model = managed(State.DEVICE, retiring=True)
    ask(model)
    assert next_step(model, 0, separate=True) == Move("m", State.DEVICE, State.RELEASED)
    assert next_step(managed(State.RELEASED, retiring=True, prefetch=True), 0, separate=True) is None


def test_a_broken_engine_leaves_the_device_at_once_and_the_host_when_it_is_called_for() -> None:
    assert next_step(managed(State.DEVICE, broken=True), 0, separate=True) == Move("m", State.DEVICE, State.RELEASED)
    resting = managed(State.HOST, broken=True)
    assert next_step(resting, 0, separate=True) is None
    ask(resting)
    assert next_step(resting, 0, separate=True) == Move("m", State.HOST, State.RELEASED)
    wanted = managed(State.HOST, broken=True, prefetch=True)
    assert next_step(wanted, 0, separate=True) == Move("m", State.HOST, State.RELEASED)


@pytest.mark.parametrize("state", [State.HOST, State.RELEASED])
def test_a_model_that_was_warmed_by_hand_is_brought(state: State) -> None:
    assert next_step(managed(state, prefetch=True), 0, separate=True) == Move("m", state, State.DEVICE)
    assert next_step(managed(State.DEVICE, prefetch=True), 0, separate=True) is None


def test_a_promise_to_stay_warm_outlasts_the_idle_timeout() -> None:
    pinned = managed(State.DEVICE, keep_warm_s=math.inf)
    assert pinned.stays
    assert next_step(pinned, 1e9, separate=True) is None
    long_warm = managed(State.DEVICE, keep_warm_s=200)
    assert not long_warm.stays
    assert next_step(long_warm, 199, separate=True) is None
    assert next_step(long_warm, 200, separate=True) == Move("m", State.DEVICE, State.RELEASED)


def test_one_memory_is_never_offloaded_but_released() -> None:
    model = managed(State.DEVICE)
    assert next_step(model, 50, separate=False) is None
    assert next_deadline(model, 0, separate=False) == 100
    assert next_step(model, 100, separate=False) == Move("m", State.DEVICE, State.RELEASED)


def test_move_towards_never_goes_up() -> None:
    assert move_towards(managed(State.HOST), State.HOST, True) is None
    assert move_towards(managed(State.RELEASED), State.HOST, True) is None
    assert move_towards(managed(State.RELEASED), State.RELEASED, True) is None
    assert move_towards(managed(State.DEVICE), State.HOST, False) is None
    assert move_towards(managed(State.DEVICE), State.RELEASED, False) == Move("m", State.DEVICE, State.RELEASED)


def test_after_a_failure_or_a_warming_the_ladder_waits() -> None:
    model = managed(State.DEVICE, policy_paused_until_s=50.0)
    assert next_step(model, 49.9, separate=True) is None
    assert next_deadline(model, 0, separate=True) == 50
    assert next_step(model, 50, separate=True) == Move("m", State.DEVICE, State.HOST)


# -- windows ----------------------------------------------------------------------------------------------------


def test_a_later_window_brings_a_model_back_and_lets_it_go_again() -> None:
    policy = Windows(((0.0, 5.0), (40.0, 60.0)))
    on, off = managed(State.DEVICE, policy=policy), managed(State.HOST, policy=policy)
    assert next_step(on, 4.9, separate=True) is None
    assert next_step(on, 5, separate=True) == Move("m", State.DEVICE, State.HOST)
    assert next_step(off, 39.9, separate=True) is None
    assert next_step(off, 40, separate=True) == Move("m", State.HOST, State.DEVICE)
    assert next_step(off, 60, separate=True) is None
    assert next_step(on, 59.9, separate=True) is None
    assert next_step(on, 60, separate=True) == Move("m", State.DEVICE, State.HOST)
    assert [next_deadline(off, now_s, separate=True) for now_s in (0, 40, 60)] == [40, 40, 100]
    assert [next_deadline(on, now_s, separate=True) for now_s in (0, 30, 45)] == [5, 30, 60]


def test_a_window_brings_back_neither_what_was_released_nor_what_was_sent_away() -> None:
    policy = Windows(((0.0, 0.0), (40.0, 60.0)))
    assert next_step(managed(State.RELEASED, policy=policy), 50, separate=True) is None
    assert next_step(managed(State.HOST, policy=policy, moved_away_by_hand=True), 50, separate=True) is None
    assert next_step(managed(State.HOST, policy=policy, moved_away_by_hand=True), 100, separate=True) == Move(
        "m", State.HOST, State.RELEASED
    )


def test_the_first_window_brings_nothing_back() -> None:
    assert next_step(managed(State.HOST, keep_warm_s=50), 20, separate=True) is None


def test_the_idle_timeout_waits_for_the_last_window() -> None:
    late = managed(State.DEVICE, policy=Windows(((0.0, 5.0), (90.0, 120.0))))
    assert next_step(late, 110, separate=True) is None
    assert next_step(late, 120, separate=True) == Move("m", State.DEVICE, State.RELEASED)


def test_a_request_that_asked_for_its_own_time_comes_before_the_policy() -> None:
    policy = Windows(((0.0, 5.0), (40.0, 60.0)), keep_warm_s=5.0)
    on, off = (managed(state, policy=policy, asked_warm_s=20.0) for state in (State.DEVICE, State.HOST))
    assert (on.keep_warm_s, on.windows(), next_deadline(on, 0, separate=True)) == (20, ((0.0, 20.0),), 20)
    assert next_step(on, 20, separate=True) == Move("m", State.DEVICE, State.HOST)
    assert next_step(off, 50, separate=True) is None
    assert next_deadline(off, 0, separate=True) == 100
    off.times.left_after_s = 15.0  # before its 20 seconds had passed
    assert next_deadline(off, 0, separate=True) == 115


@pytest.mark.parametrize(
    ("keep_warm_s", "asked_warm_s", "stays"),
    [(math.inf, None, True), (math.inf, math.inf, True), (math.inf, 300.0, False), (10.0, math.inf, False)],
)
def test_only_the_policy_keeps_a_model_from_those_that_need_room(
    keep_warm_s: float, asked_warm_s: float | None, stays: bool
) -> None:
    new, model = managed(State.HOST, name="new", size_bytes=60), managed(State.DEVICE, keep_warm_s, size_bytes=60)
    model.asked_warm_s = asked_warm_s
    ask(new)
    assert model.stays == stays
    assert room_for(new, [new, model], 100).hopeless == stays
    assert over_budget([model], 50) == ([] if stays else [Move("m", State.DEVICE, State.HOST)])


WINDOWS = st.lists(st.integers(0, 200), min_size=1, max_size=6, unique=True).map(
    lambda edges: ((0.0, float(min(edges))), *zip(*[iter(map(float, sorted(edges)[1:]))] * 2, strict=False))
)


@given(
    st.sampled_from(SETTLED), WINDOWS, st.sampled_from([0.0, 7.5, 100.0, math.inf]),
    st.sampled_from([-math.inf, 50.0, 500.0]), st.booleans(), st.floats(0, 300), st.booleans(),
    st.sampled_from([None, 0.0, 30.0, 200.0, math.inf]), st.sampled_from([0.0, 20.0, 150.0]),
)  # fmt: skip
def test_a_deadline_is_exactly_when_a_step_becomes_due(
    state: State,
    windows: tuple[tuple[float, float], ...],
    idle_timeout_s: float,
    paused_until_s: float,
    separate: bool,
    now_s: float,
    moved_away_by_hand: bool,
    asked_warm_s: float | None,
    left_after_s: float,
) -> None:
    model = managed(
        state, policy=Windows(windows, idle_timeout_s), policy_paused_until_s=paused_until_s,
        moved_away_by_hand=moved_away_by_hand, idle_since_s=0.1, asked_warm_s=asked_warm_s, left_after_s=left_after_s,
    )  # fmt: skip
    deadline = next_deadline(model, now_s, separate)
    assert deadline >= now_s
    if deadline < math.inf:
        assert next_step(model, deadline, separate) is not None
    if deadline > now_s:
        for moment in (now_s, (now_s + min(deadline, 1e4)) / 2, math.nextafter(deadline, -math.inf)):
            assert next_step(model, moment, separate) is None


def test_a_loader_has_a_deadline() -> None:
    assert next_deadline(moving(managed(State.RELEASED), State.DEVICE, 30.0), 0, separate=True) == 30.0


def test_every_move_starts_and_ends_settled_and_passes_through_a_moving_state() -> None:
    for (source, target), via in TRANSITIONS.items():
        assert source.settled
        assert target.settled
        assert not via.settled
    with pytest.raises(KeyError):
        _ = Move("m", State.RELEASED, State.HOST).via


# -- room -------------------------------------------------------------------------------------------------------


def test_what_fits_may_go() -> None:
    new, other = managed(State.HOST, name="new", size_bytes=40), managed(State.DEVICE, name="other", size_bytes=60)
    ask(new)
    assert room_for(new, [new, other], 100) == Room()
    assert room_for(new, [new, other], math.inf) == Room()
    assert room_for(new, [new, other], 99) == Room((Move("other", State.DEVICE, State.HOST),), wait=True)


def test_the_one_unused_for_longest_leaves_first_and_no_more_than_needed() -> None:
    new = managed(State.HOST, name="new", size_bytes=50)
    old, older, oldest = (
        managed(State.DEVICE, name=name, size_bytes=30, idle_since_s=since)
        for name, since in [("old", 3.0), ("older", 2.0), ("oldest", 1.0)]
    )
    ask(new)
    room = room_for(new, [new, old, older, oldest], 100)
    assert [move.model for move in room.evict] == ["oldest", "older"]
    room = room_for(new, [new, old, older, oldest], 110)
    assert [move.model for move in room.evict] == ["oldest"]


def test_a_model_in_use_is_waited_for_and_the_idle_ones_leave_meanwhile() -> None:
    new, busy = managed(State.HOST, name="new", size_bytes=90), hold(managed(State.DEVICE, name="busy", size_bytes=50))
    idle = managed(State.DEVICE, name="idle", size_bytes=50)
    ask(new)
    assert room_for(new, [new, busy, idle], 100) == Room((Move("idle", State.DEVICE, State.HOST),), wait=True)
    assert room_for(new, [new, busy], 100) == Room((), wait=True)


def test_what_is_leaving_is_waited_for_and_nothing_else_is_sent_away() -> None:
    new, idle = managed(State.HOST, name="new", size_bytes=50), managed(State.DEVICE, name="idle", size_bytes=50)
    leaving = moving(managed(State.DEVICE, name="leaving", size_bytes=50), State.HOST)
    ask(new)
    assert room_for(new, [new, idle, leaving], 100) == Room((), wait=True)


def test_what_is_on_its_way_to_the_device_takes_room_already() -> None:
    new, coming = managed(State.HOST, name="new", size_bytes=60), managed(State.HOST, name="coming", size_bytes=60)
    moving(coming, State.DEVICE)
    ask(new)
    assert room_for(new, [new, coming], 100) == Room((), wait=True)


def test_who_can_never_fit_is_told_so() -> None:
    big, pinned = managed(State.HOST, name="big", size_bytes=101), managed(State.DEVICE, math.inf, size_bytes=30)
    ask(big)
    assert room_for(big, [big], 100) == Room(hopeless=True)
    big.memory.size_bytes = 80
    assert room_for(big, [big, pinned], 100) == Room(hopeless=True)
    assert room_for(big, [big, hold(pinned)], 100) == Room(hopeless=True)
    assert room_for(big, [big, pinned], 110) == Room()


def test_a_model_that_could_not_be_offloaded_is_released_for_others() -> None:
    new, stuck = (
        managed(State.HOST, name="new", size_bytes=60),
        managed(State.DEVICE, size_bytes=60, cannot_offload=True),
    )
    ask(new)
    assert room_for(new, [new, stuck], 100) == Room((Move("m", State.DEVICE, State.RELEASED),), wait=True)
    assert room_for(new, [new, hold(stuck)], 100) == Room((), wait=True)


def test_what_the_device_refused_sends_others_away_without_any_budget() -> None:
    new = managed(State.HOST, name="new", size_bytes=60, shortfall_bytes=20)
    small, large = (managed(State.DEVICE, name=name, size_bytes=size) for name, size in [("small", 10), ("large", 50)])
    small.times.idle_since_s = -1.0
    ask(new)
    assert [move.model for move in room_for(new, [new, small, large], math.inf).evict] == ["small", "large"]
    assert room_for(new, [new], math.inf) == Room(hopeless=True)
    new.memory.shortfall_bytes = 5
    assert [move.model for move in room_for(new, [new, small, large], math.inf).evict] == ["small"]


def test_a_model_that_comes_for_the_first_time_may_be_what_fills_the_device() -> None:
    new, coming = (
        managed(State.HOST, name="new", size_bytes=60, shortfall_bytes=1),
        managed(State.RELEASED, name="coming"),
    )
    ask(new)
    assert room_for(new, [new, moving(coming, State.DEVICE)], math.inf) == Room((), wait=True)


def test_a_model_without_bytes_makes_no_room() -> None:
    new, empty = managed(State.HOST, name="new", size_bytes=60, shortfall_bytes=1), managed(State.DEVICE, size_bytes=0)
    ask(new)
    assert room_for(new, [new, empty], math.inf) == Room(hopeless=True)


def test_who_came_first_gets_the_room_though_others_wait_for_the_model_that_has_it() -> None:
    first, second = (
        managed(State.HOST, name="first", size_bytes=60),
        managed(State.DEVICE, name="second", size_bytes=60),
    )
    ask(first, 1)
    ask(second, 2)
    assert room_for(first, [first, second], 100).evict == (Move("second", State.DEVICE, State.HOST),)
    later = managed(State.HOST, name="later", size_bytes=60)
    ask(later, 3)
    assert room_for(later, [later, second], 100) == Room((), wait=True)


def test_nobody_overtakes_an_older_request_that_waits_for_room() -> None:
    old, young = (
        managed(State.HOST, name="old", size_bytes=90, waiting_for_room=True),
        managed(State.HOST, name="young", size_bytes=10),
    )
    ask(old, 1)
    request = ask(young, 2)
    assert room_for(young, [old, young], 100) == Room(wait=True)
    # But somebody who holds another model might be whom the old one waits for.
    request.holding = (managed(State.DEVICE, name="held"),)
    assert room_for(young, [old, young], 100) == Room()
    request.holding = ()
    old.memory.waiting_for_room = False
    assert room_for(young, [old, young], 100) == Room()
    old.memory.waiting_for_room = True
    assert room_for(old, [old, young], 100) == Room()


def test_nobody_waits_for_room_that_they_hold_themselves() -> None:
    held, wanted = hold(managed(State.DEVICE, name="held", size_bytes=60)), managed(State.HOST, name="w", size_bytes=60)
    ask(wanted, 1, holding=(held,))
    assert room_for(wanted, [held, wanted], 100) == Room(hopeless=True)


def test_nobody_waits_for_room_of_somebody_who_waits_for_room() -> None:
    mine, theirs = (hold(managed(State.DEVICE, name=name, size_bytes=50)) for name in ("mine", "theirs"))
    third, fourth = (managed(State.HOST, name=name, size_bytes=50) for name in ("third", "fourth"))
    ask(third, 1, holding=(mine,))
    third.memory.waiting_for_room = True
    ask(fourth, 2, holding=(theirs,))
    assert room_for(fourth, [mine, theirs, third, fourth], 100) == Room(hopeless=True)
    third.memory.waiting_for_room = False
    assert room_for(fourth, [mine, theirs, third, fourth], 100) == Room((), wait=True)


def test_a_restore_that_nobody_waits_for_takes_free_room_only_and_one_by_hand_idle_room() -> None:
    new, idle = managed(State.HOST, name="new", size_bytes=60), managed(State.DEVICE, name="idle", size_bytes=60)
    assert room_for(new, [new, idle], 100) == Room(hopeless=True)
    assert room_for(new, [new, idle], 120) == Room()
    new.wishes.prefetch = True
    assert room_for(new, [new, idle], 100).evict == (Move("idle", State.DEVICE, State.HOST),)
    ask(idle)
    assert room_for(new, [new, idle], 100) == Room(hopeless=True)


def test_over_budget_the_idle_ones_leave() -> None:
    a, b, busy = (managed(State.DEVICE, name=name, size_bytes=50) for name in "abc")
    a.times.idle_since_s = 5.0
    hold(busy)
    assert over_budget([a, b, busy], 150) == []
    assert over_budget([a, b, busy], 149) == [Move("b", State.DEVICE, State.HOST)]
    assert [move.model for move in over_budget([a, b, busy], 60)] == ["b", "a"]
    moving(b, State.HOST)
    assert over_budget([a, b, busy], 100) == []
    assert over_budget([managed(State.HOST, size_bytes=500)], 100) == []


def test_by_arrival() -> None:
    late, early, none = managed(State.HOST), managed(State.HOST), managed(State.HOST)
    ask(late, 7)
    ask(early, 3)
    assert by_arrival([none, late, early]) == [early, late, none]


# -- waiting in circles -----------------------------------------------------------------------------------------


def test_waiting_in_a_circle_is_seen() -> None:
    a, b, c = (hold(managed(State.DEVICE, name=name)) for name in "abc")
    models = [a, b, c]
    ask(b, 1, holding=(a,))
    ask(c, 2, holding=(b,))
    assert would_wait_for_itself(LeaseRequest(a, 3, HERE, holding=(c,)), models)
    assert not would_wait_for_itself(LeaseRequest(c, 3, HERE, holding=(a,)), models)
    assert not would_wait_for_itself(LeaseRequest(a, 3, HERE), models)


def test_of_several_who_wait_each_may_close_the_circle() -> None:
    a, b, c = (hold(managed(State.DEVICE, name=name)) for name in "abc")
    ask(b, 1, holding=(a,))
    ask(c, 2, holding=(a,))
    for held in (b, c):
        assert would_wait_for_itself(LeaseRequest(a, 3, HERE, holding=(held,)), [a, b, c])


def test_a_loader_that_asks_for_its_own_model_waits_for_itself() -> None:
    a = moving(managed(State.RELEASED), State.DEVICE)
    assert would_wait_for_itself(LeaseRequest(a, 1, HERE, holding=(a,)), [a])


def test_who_was_answered_holds_up_nobody() -> None:
    a, b = (hold(managed(State.DEVICE, name=name)) for name in "ab")
    ask(b, 1, holding=(a,)).answer(TimeoutError())
    assert not would_wait_for_itself(LeaseRequest(a, 2, HERE, holding=(b,)), [a, b])


def test_a_request_begins_unanswered_and_an_answer_lets_go_of_who_asked() -> None:
    request = LeaseRequest(ManagedModel("tts", dict, FixedPolicy()), 1, HERE)
    assert (request.answered, request.error, request.context, request.asked_s) == (False, None, None, 0)
    request.context = contextvars.Context()
    request.answer()
    assert (request.answered, request.error, request.context) == (True, None, None)
