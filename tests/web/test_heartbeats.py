from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from residency.web.server import heartbeats as presence_module
from residency.web.server.heartbeats import Heartbeats


class Loop:
    """Of a server, with a clock that is turned by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._waiting: list[tuple[float, Callable[[], object], list[bool]]] = []

    def call_later(self, delay_s: float, function: Callable[..., object], *arguments: object) -> Loop.Handle:
        cancelled: list[bool] = []
        self._waiting.append((self.now_s + delay_s, lambda: function(*arguments), cancelled))
        return Loop.Handle(cancelled, self.now_s + delay_s)

    def run_in_executor(self, executor: None, function: Callable[..., object], *arguments: object) -> Loop.Done:
        return Loop.Done(function(*arguments))

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        due = [each for each in self._waiting if each[0] <= self.now_s]
        self._waiting = [each for each in self._waiting if each[0] > self.now_s]
        for _, act, cancelled in due:
            if not cancelled:
                act()

    class Done:
        """A future that is done."""

        def __init__(self, result: object) -> None:
            self._result = result

        def add_done_callback(self, callback: Callable[[Loop.Done], object]) -> None:
            callback(self)

        def cancelled(self) -> bool:
            return False

        def result(self) -> object:
            return self._result

    class Handle:
        def __init__(self, cancelled: list[bool], when_s: float) -> None:
            self._cancelled, self._when_s = cancelled, when_s

        def when(self) -> float:
            return self._when_s

        def cancel(self) -> None:
            self._cancelled.append(True)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    loop = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    monkeypatch.setattr(presence_module, "LEFT_FOR_S", 60.0)
    monkeypatch.setattr(presence_module, "time", SimpleNamespace(monotonic=lambda: loop.now_s))
    return loop


@pytest.fixture
def told() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def presence(loop: Loop, told: list[tuple[str, str]]) -> Heartbeats:
    return Heartbeats(lambda session: told.append(("begins", session)), lambda session: told.append(("ends", session)))


def ended(told: list[tuple[str, str]]) -> list[str]:
    return [session for what, session in told if what == "ends"]


def test_who_holds_a_line_is_there_for_as_long(presence: Heartbeats, loop: Loop, told: list[tuple[str, str]]) -> None:
    with presence.stream("anna"):
        loop.advance(1000)
        assert told == [("begins", "anna")]
    loop.advance(59)
    assert ended(told) == []
    loop.advance(1)
    assert ended(told) == ["anna"]


def test_who_takes_the_line_up_again_was_never_away(
    presence: Heartbeats, loop: Loop, told: list[tuple[str, str]]
) -> None:
    with presence.stream("anna"):
        pass
    loop.advance(59)
    with presence.stream("anna"):
        loop.advance(1000)
    assert ended(told) == []


def test_a_line_that_was_cut_and_never_taken_up_again_is_no_end_while_something_is_heard(
    presence: Heartbeats, loop: Loop, told: list[tuple[str, str]]
) -> None:
    with presence.stream("anna"), presence.stream("bert"):
        pass
    for _ in range(10):
        loop.advance(59)
        presence.beat("anna")
    assert ended(told) == ["bert"]
    loop.advance(60)
    assert ended(told) == ["bert", "anna"]


def test_the_end_of_one_of_two_lines_is_no_end_and_is_corrected(
    presence: Heartbeats, loop: Loop, told: list[tuple[str, str]]
) -> None:
    with presence.stream("anna"):
        with presence.stream("anna"):
            told.clear()
        assert told == [("begins", "anna")], "Gradio has taken it for gone"
        loop.advance(1000)
    assert ended(told) == []


def test_who_comes_back_begins_again(presence: Heartbeats, loop: Loop, told: list[tuple[str, str]]) -> None:
    presence.beat("anna")
    loop.advance(60)
    presence.beat("anna")
    assert told == [("begins", "anna"), ("ends", "anna"), ("begins", "anna")]
    loop.advance(60)
    assert ended(told) == ["anna", "anna"]


def test_of_too_many_who_are_silent_the_one_silent_for_longest_has_ended(
    presence: Heartbeats, loop: Loop, told: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence_module, "_SILENT_AT_MOST", 2)
    with presence.stream("holds a line"):
        for session in ("anna", "bert", "anna", "carl"):
            presence.beat(session)
        assert ended(told) == ["bert"]
        assert [session in presence for session in ("anna", "bert", "carl", "holds a line")] == [
            True,
            False,
            True,
            True,
        ]
        loop.advance(60)
        assert ended(told) == ["bert", "anna", "carl"]


def test_a_session_of_which_requests_still_wait_is_asked_about_again(loop: Loop) -> None:
    asked: list[float] = []
    presence = Heartbeats(lambda session: None, lambda session: bool(asked.append(loop.now_s)) or len(asked) < 3, 20)
    with presence.stream("anna"):
        loop.advance(100)
    for _ in range(5):
        loop.advance(20)
    assert asked == [120, 140, 160]
    assert "anna" not in presence


def test_silent_sessions_are_told_with_the_longest_silent_first(presence: Heartbeats, loop: Loop) -> None:
    presence.beat("first")
    presence.beat("second")
    loop.advance(10)
    presence.beat("first")
    with presence.stream("connected"):
        loop.advance(20)
        assert presence.silent(20) == ["second", "first"]
        assert presence.silent(21) == ["second"]
    assert presence.silent(0) == ["second", "first", "connected"]
