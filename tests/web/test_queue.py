"""An engine without a manager serves one request at a time, in order of arrival; who has gone or is stopped leaves."""

from __future__ import annotations

import threading

import pytest
from fakes import Gate, Worker

from residency.cancellation import Cancellation, cancelled_by
from residency.errors import ManagerClosed, RequestCancelled, RequestStopped
from residency.web.shared.language import en
from residency.web.speech.queue import SpeechQueue
from residency.web.ui import waiting as waiting_module
from residency.web.ui.waiting import WaitMessages


@pytest.fixture
def turns() -> SpeechQueue:
    return SpeechQueue("tts")


class Asker:
    """Asks in a thread of its own, and remembers what it was told."""

    def __init__(self, turns: SpeechQueue, waiting: WaitMessages, stopped: bool = False) -> None:
        self.gate, self.told, self.cancellation = Gate(), list[str](), Cancellation()
        if stopped:
            self.cancellation.cancel()
        self._news = threading.Condition()
        self._turns, self._waiting = turns, waiting
        self.worker = Worker(self._ask)

    def _ask(self) -> None:
        with cancelled_by(self.cancellation), self._waiting.told("tts", self._tell), self._turns.take():
            self.gate.pass_through()

    def _tell(self, share: float, sentence: str) -> None:
        with self._news:
            self.told.append(sentence)
            self._news.notify_all()

    def await_told(self, words: str) -> None:
        with self._news:
            assert self._news.wait_for(lambda: any(words in told for told in self.told), 30), self.told


@pytest.fixture
def waiting(turns: SpeechQueue, monkeypatch: pytest.MonkeyPatch) -> WaitMessages:
    monkeypatch.setattr(waiting_module, "localizer", lambda: en)
    monkeypatch.setattr(waiting_module, "session", lambda: threading.current_thread().name)
    return WaitMessages(turns)


def test_each_waits_for_their_turn_and_hears_their_place(turns: SpeechQueue, waiting: WaitMessages) -> None:
    first = Asker(turns, waiting)
    first.gate.wait_for_arrival()
    second = Asker(turns, waiting)
    second.await_told("you are next")
    third = Asker(turns, waiting)
    third.await_told("place 2 in the queue")
    assert not second.gate.arrived
    first.gate.open()
    second.gate.wait_for_arrival()
    second.await_told("generating")
    third.await_told("you are next")
    assert not third.gate.arrived
    for asker in (second, third):
        asker.gate.open()
    for asker in (first, second, third):
        asker.worker.result()


def test_who_is_stopped_leaves_the_queue_and_who_runs_is_not_touched(turns: SpeechQueue, waiting: WaitMessages) -> None:
    first = Asker(turns, waiting)
    first.gate.wait_for_arrival()
    second = Asker(turns, waiting)
    second.await_told("you are next")
    second.cancellation.cancel()
    with pytest.raises(RequestStopped):
        second.worker.result()
    assert not second.gate.arrived
    first.cancellation.cancel()  # for the engine to find
    first.gate.open()
    first.worker.result()
    with turns.take():
        pass


def test_who_has_gone_leaves_the_queue(
    turns: SpeechQueue, waiting: WaitMessages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting_module, "session", lambda: "gone")
    with turns.take():
        asker = Asker(turns, waiting)
        asker.await_told("you are next")
        waiting.gone("gone", 0)
        with pytest.raises(RequestCancelled):
            asker.worker.result()


def test_a_request_that_was_stopped_before_it_waits_does_not_wait(turns: SpeechQueue, waiting: WaitMessages) -> None:
    with turns.take():
        asker = Asker(turns, waiting, stopped=True)
        with pytest.raises(RequestStopped):
            asker.worker.result()


def test_the_end_refuses_who_waits_and_who_comes_but_not_who_runs(turns: SpeechQueue, waiting: WaitMessages) -> None:
    first = Asker(turns, waiting)
    first.gate.wait_for_arrival()
    second = Asker(turns, waiting)
    second.await_told("you are next")
    turns.close()
    with pytest.raises(ManagerClosed):
        second.worker.result()
    with pytest.raises(ManagerClosed), turns.take():
        pass
    first.gate.open()
    first.worker.result()


def test_who_has_the_engine_may_ask_again_meanwhile(turns: SpeechQueue) -> None:
    with turns.take(), turns.take():
        pass
    with turns.take():
        pass
