"""An engine without a manager serves one request at a time, in order of arrival; who has gone or is stopped leaves."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from app_process import wait_until
from fakes import Gate, Worker

from residency.cancellation import Cancellation, cancelled_by
from residency.errors import ManagerClosed, RequestCancelled, RequestStopped
from residency.web.shared.language import en
from residency.web.speech.queue import SpeechQueue
from residency.web.speech.recordings import Recordings
from residency.web.speech.service import SpeechService
from residency.web.ui import waiting as waiting_module
from residency.web.ui.waiting import WaitingRequests


@pytest.fixture
def queue() -> SpeechQueue:
    return SpeechQueue("tts")


class Asker:
    """Asks in a thread of its own."""

    def __init__(self, queue: SpeechQueue, waiting: WaitingRequests, stopped: bool = False) -> None:
        self.gate, self.cancellation, self._watched = Gate(), Cancellation(), threading.Event()
        if stopped:
            self.cancellation.cancel()
        self._queue, self._waiting = queue, waiting
        self.worker = Worker(self._ask)
        assert self._watched.wait(30)

    def _ask(self) -> None:
        with cancelled_by(self.cancellation), self._waiting.watched("tts") as self.progress:
            self._watched.set()
            with self._queue.reserved():
                self.gate.pass_through()

    def reads(self, words: str) -> bool:
        return wait_until(lambda: words in str(self.progress()))


@pytest.fixture
def waiting(queue: SpeechQueue, monkeypatch: pytest.MonkeyPatch) -> WaitingRequests:
    monkeypatch.setattr(waiting_module, "localizer", lambda: en)
    monkeypatch.setattr(waiting_module, "session", lambda: threading.current_thread().name)
    return WaitingRequests(queue)


def test_each_waits_for_their_turn_and_hears_their_place(queue: SpeechQueue, waiting: WaitingRequests) -> None:
    first = Asker(queue, waiting)
    first.gate.wait_for_arrival()
    second = Asker(queue, waiting)
    assert second.reads("you are next")
    third = Asker(queue, waiting)
    assert third.reads("place 2 in the queue")
    assert not second.gate.arrived
    first.gate.open()
    second.gate.wait_for_arrival()
    assert second.reads("generating")
    assert third.reads("you are next")
    assert not third.gate.arrived
    for asker in (second, third):
        asker.gate.open()
    for asker in (first, second, third):
        asker.worker.result()


def test_who_is_stopped_leaves_the_queue_and_who_runs_is_not_touched(
    queue: SpeechQueue, waiting: WaitingRequests
) -> None:
    first = Asker(queue, waiting)
    first.gate.wait_for_arrival()
    second = Asker(queue, waiting)
    assert second.reads("you are next")
    second.cancellation.cancel()
    with pytest.raises(RequestStopped):
        second.worker.result()
    assert not second.gate.arrived
    first.cancellation.cancel()  # for the engine to find
    first.gate.open()
    first.worker.result()
    with queue.reserved():
        pass


def test_who_has_gone_leaves_the_queue(
    queue: SpeechQueue, waiting: WaitingRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting_module, "session", lambda: "gone")
    with queue.reserved():
        asker = Asker(queue, waiting)
        assert asker.reads("you are next")
        waiting.cancel_waiting("gone", 0)
        with pytest.raises(RequestCancelled):
            asker.worker.result()


def test_a_request_that_was_stopped_before_it_waits_does_not_wait(queue: SpeechQueue, waiting: WaitingRequests) -> None:
    with queue.reserved():
        asker = Asker(queue, waiting, stopped=True)
        with pytest.raises(RequestStopped):
            asker.worker.result()


def test_the_end_refuses_who_waits_and_who_comes_but_not_who_runs(queue: SpeechQueue, waiting: WaitingRequests) -> None:
    first = Asker(queue, waiting)
    first.gate.wait_for_arrival()
    second = Asker(queue, waiting)
    assert second.reads("you are next")
    queue.close()
    with pytest.raises(ManagerClosed):
        second.worker.result()
    with pytest.raises(ManagerClosed), queue.reserved():
        pass
    first.gate.open()
    first.worker.result()


def test_the_end_refuses_recordings_that_wait_for_a_recognizer_without_a_manager(tmp_path: Path) -> None:
    gate = Gate()

    def recognize(path: str) -> str:
        gate.pass_through()
        return "heard"

    service = SpeechService(None, {}, Recordings(tmp_path), recognize, queue=SpeechQueue("tts"))
    first = Worker(service.transcribe, "one.wav")
    gate.wait_for_arrival()
    second = Worker(service.transcribe, "another.wav")
    assert wait_until(lambda: service.running == 2)
    service.close()
    with pytest.raises(ManagerClosed):
        second.result()
    gate.open()
    assert first.result() == "heard"


def test_who_has_the_engine_may_ask_again_meanwhile(queue: SpeechQueue) -> None:
    with queue.reserved(), queue.reserved():
        pass
    with queue.reserved():
        pass
