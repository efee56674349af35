"""The thread that watches the card, step by step: when it looks, and when neighbours get their memory back."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from gpu_manager import SimulatedDevice
from residency.arrivals import Arrival
from residency.errors import InvalidInput, NeighborUnreachable
from residency.sharing import card as card_module
from residency.sharing.asking import AGAIN_AFTER_S, Asking
from residency.sharing.board import PrivateBoard
from residency.sharing.card import GIVE_BACK_AFTER_S, LOOK_EVERY_S, SharedCard, ask_neighbor
from residency.sharing.tickets import PRESENCE, STRANGER, Ticket

MB = 1 << 20
CAPACITY = 100 * MB
OTHER = 900_000_000
LOSES_ITS_ANSWER = "http://127.0.0.1:8001"
IN_USE = "http://127.0.0.1:8002"


class Models:
    """See `residency.sharing.room.Leaving`: one model."""

    there = False

    def on_card(self) -> bool:
        return self.there

    def own_pids(self) -> set[int]:
        return set()

    def count_on_card(self) -> int:
        return 1

    def offers(self) -> dict[str, tuple[float, int]]:
        return {}

    def leave(self, nbytes: int, before_s: float | None) -> tuple[dict[str, int], int]:
        return {}, nbytes


class Neighbors:
    """See `Asking`: one that has given up ``owed`` bytes. ``calls``: at which times it got them back."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self.owed, self.fails, self.given_back, self._now_s = 0, 0, list[float](), now_s

    def ask_one(self, url: str) -> None:
        if url == IN_USE:
            raise InvalidInput("in use", "正在使用")
        self.owed = 80 * MB
        if url == LOSES_ITS_ANSWER:
            raise NeighborUnreachable("vllm", url, "timed out")

    def owed_bytes(self) -> int:
        return self.owed

    def owed_urls(self) -> set[str]:
        return {LOSES_ITS_ANSWER} if self.owed else set()

    def give_back(self, may: Callable[[], bool]) -> None:
        if self.fails:
            self.fails -= 1
            raise OSError
        if self.owed:
            self.given_back.append(self._now_s())
            self.owed = 0

    @property
    def owes(self) -> bool:
        return self.owed > 0


class Watch:
    """The watch of one card on the test's clock: it runs in the test's thread, and what happens does so in its pauses.

    ``pauses``: the lengths that it has chosen, each with the time at which it begins.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, headroom_bytes: int = 0) -> None:
        self.now_s, self.pauses, self._is_set = 0.0, list[tuple[float, float | None]](), False
        monkeypatch.setattr(card_module, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        self.device, self.board = SimulatedDevice(CAPACITY), PrivateBoard()
        self.models, self.neighbors = Models(), Neighbors(lambda: self.now_s)
        asking = cast(Asking, self.neighbors)
        self.card = SharedCard(self.device, self.models, headroom_bytes=headroom_bytes, board=self.board, asking=asking)
        self.card._wake = cast(threading.Event, self)

    def run(self, until_s: float, happens: dict[float, Callable[[], object]]) -> None:
        """``happens``: calls by the time at which they happen."""
        self._happens = [*sorted((happens | {until_s: self._end}).items())]
        self.card._run()

    def comes(self) -> None:
        self.models.there = True
        self.card.wake()

    def leaves(self) -> None:
        self.models.there = False
        self.card.wake()

    def owes(self) -> None:
        self.neighbors.owed = 80 * MB

    def queue(self, *tickets: Ticket) -> None:
        self.board.change(lambda _: (tickets, None))

    def _end(self) -> None:
        self.card._closed = True
        self.card.wake()

    # -- threading.Event

    def set(self) -> None:
        self._is_set = True

    def clear(self) -> None:
        self._is_set = False

    def wait(self, pause_s: float | None) -> None:
        self.pauses.append((self.now_s, pause_s))
        end_s = math.inf if pause_s is None else self.now_s + pause_s
        while self._happens and self._happens[0][0] <= end_s:
            self.now_s, call = self._happens.pop(0)
            call()
            if self._is_set:
                return
        self.now_s = end_s


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def test_a_neighbour_gets_its_memory_back_when_the_models_have_left(watch: Watch) -> None:
    watch.run(100.0, {1.0: watch.comes, 2.0: watch.owes, 50.0: watch.leaves})
    assert watch.neighbors.given_back == [50.0]


@pytest.mark.parametrize("claimed", [False, True], ids=["waits", "moves"])
def test_a_neighbour_waits_for_those_in_the_queue(claimed: bool, watch: Watch) -> None:
    def beats() -> None:
        watch.queue(replace(other, beat_s=watch.now_s))

    other = Ticket("a", "tts", OTHER, 45.0, 60 * MB, 45.0, claimed)
    begin: dict[float, Callable[[], object]] = {1.0: watch.comes, 2.0: watch.owes, 50.5: watch.leaves}
    watch.run(200.0, {**begin, **{float(time_s): beats for time_s in range(45, 63)}})
    assert watch.neighbors.given_back == [70.5], "the first look after its end"


def test_a_neighbour_waits_for_a_program_that_has_grown(watch: Watch) -> None:
    stranger = Ticket(f"{STRANGER}{OTHER}", "", OTHER, 49.0, 10 * MB, 49.0)
    watch.queue(stranger, replace(stranger, key=f"{PRESENCE}b", claimed=True))
    watch.run(200.0, {1.0: watch.comes, 2.0: watch.owes, 50.0: watch.leaves})
    assert watch.neighbors.given_back == [55.0], "as soon as its ticket has ended"


@pytest.mark.parametrize(("free_s", "given_back_s"), [(62.0, 65.0), (300.0, 50.0 + GIVE_BACK_AFTER_S)])
def test_a_neighbour_waits_until_its_memory_is_free_but_not_for_ever(
    free_s: float, given_back_s: float, watch: Watch
) -> None:
    def take(nbytes: int) -> Callable[[], None]:
        return lambda: watch.device.report_outside(OTHER, nbytes)

    happens = {1.0: watch.comes, 2.0: watch.owes, 49.0: take(60 * MB), 50.0: watch.leaves, free_s: take(20 * MB)}
    watch.run(400.0, happens)
    assert watch.neighbors.given_back == [given_back_s]


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", LOSES_ITS_ANSWER])
def test_a_neighbour_that_was_asked_by_hand_gets_its_memory_back_after_a_while(url: str, watch: Watch) -> None:
    def ask() -> None:
        with contextlib.suppress(NeighborUnreachable):
            ask_neighbor(watch.card, url)

    watch.run(200.0, {10.0: ask})
    assert watch.neighbors.given_back == [10.0 + GIVE_BACK_AFTER_S]


def test_a_neighbour_that_was_asked_by_hand_gets_its_memory_back_when_the_models_have_left(watch: Watch) -> None:
    watch.run(200.0, {10.0: lambda: watch.card.ask_one(""), 12.0: watch.comes, 90.0: watch.leaves})
    assert watch.neighbors.given_back == [90.0]


def test_a_neighbour_in_use_that_is_asked_by_hand_does_not_delay_what_is_due_for_another(watch: Watch) -> None:
    def ask() -> None:
        with contextlib.suppress(InvalidInput):
            watch.card.ask_one(IN_USE)

    watch.run(200.0, {10.0: lambda: watch.card.ask_one(""), **{float(time_s): ask for time_s in range(20, 150, 20)}})
    assert watch.neighbors.given_back == [10.0 + GIVE_BACK_AFTER_S]


def test_a_neighbour_asked_for_a_request_that_has_given_up_waits_for_the_queue(watch: Watch) -> None:
    def ended() -> None:
        watch.owes()
        watch.queue(Ticket("a", "tts", OTHER, 9.0, 60 * MB, 12.0))
        watch.card.wake()

    watch.run(200.0, {10.0: ended})
    assert watch.neighbors.given_back == [20.0], "the first look after its end"


def test_the_watch_goes_on_after_errors(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    watch.neighbors.fails = 2
    watch.run(200.0, {1.0: watch.comes, 2.0: watch.owes, 50.0: watch.leaves})
    assert len(watch.neighbors.given_back) == 1
    assert caplog.text.count("The watch over the card met an error") == 2


def test_the_card_is_looked_at_seldom_where_nobody_is_left_for(watch: Watch) -> None:
    """With neighbours alone, without headroom and queue: only the moves of this process need it."""

    def move() -> Iterator[None]:
        with watch.card.place(Arrival("tts", 0.0, lambda: True, lambda nbytes, why: None)) as claim:
            claim(MB)
            yield

    moves = move()
    watch.run(100.0, {1.0: watch.comes, 20.5: lambda: next(moves), 21.5: lambda: next(moves, None), 50.0: watch.leaves})
    lengths = {(20.5 <= begin_s < 21.5, pause_s) for begin_s, pause_s in watch.pauses if 1.0 <= begin_s < 50.0}
    assert lengths == {(True, LOOK_EVERY_S), (False, AGAIN_AFTER_S)}


def test_the_card_is_looked_at_often_where_models_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch, headroom_bytes=MB)
    watch.run(100.0, {1.0: watch.comes, 50.0: watch.leaves})
    assert {pause_s for begin_s, pause_s in watch.pauses if 1.0 <= begin_s < 50.0} == {LOOK_EVERY_S}
