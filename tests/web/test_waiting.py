"""Who waits reads why, in the order of the queue; who has gone leaves it."""

from __future__ import annotations

import threading

import pytest
from app_process import wait_until
from fakes import Gate, Worker, Workshop

from gpu_manager import CpuDevice, GPUResourceManager, RequestCancelled
from residency.web.shared.language import en
from residency.web.ui import waiting as waiting_module
from residency.web.ui.waiting import WaitingRequests


@pytest.fixture(autouse=True)
def sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread is of the session of its name, and reads English."""
    monkeypatch.setattr(waiting_module, "session", lambda: threading.current_thread().name)
    monkeypatch.setattr(waiting_module, "localizer", lambda: en)


class Person:
    """Asks for speech in a thread whose name is their session."""

    def __init__(self, waiting: WaitingRequests, manager: GPUResourceManager, name: str) -> None:
        self.gate, self._waiting, self._manager = Gate(), waiting, manager
        self._watched = threading.Event()
        self.worker = Worker(self._ask, name)
        assert self._watched.wait(30)

    def _ask(self, name: str) -> None:
        threading.current_thread().name = name
        with self._waiting.watched("tts") as self.progress:
            self._watched.set()
            with self._manager.lease("tts"):
                self.gate.pass_through()

    def reads(self, words: str) -> bool:
        return wait_until(lambda: words in str(self.progress()))


def test_each_hears_their_place_and_then_their_turn(manager: GPUResourceManager) -> None:
    waiting = WaitingRequests(manager)
    first = Person(waiting, manager, "first")
    first.gate.wait_for_arrival()
    second = Person(waiting, manager, "second")
    assert second.reads("you are next")
    third = Person(waiting, manager, "third")
    assert third.reads("place 2 in the queue")
    first.gate.open()
    first.worker.result()
    second.gate.wait_for_arrival()
    assert second.reads("generating")
    assert third.reads("you are next")
    for person in (second, third):
        person.gate.open()
        person.worker.result()


def test_the_model_stays_for_who_waits(manager: GPUResourceManager) -> None:
    waiting, moves = WaitingRequests(manager), list[tuple[str, str]]()
    manager.subscribe(lambda event: moves.append((event.source, event.target)) if event.what == "done" else None)
    first = Person(waiting, manager, "first")
    first.gate.wait_for_arrival()
    second = Person(waiting, manager, "second")
    assert second.reads("you are next")
    for person in (first, second):
        person.gate.open()
        person.worker.result()
    manager.close()
    assert moves[:2] == [("released", "gpu"), ("gpu", "cpu")], "it left between two requests"


def test_who_has_gone_leaves_the_queue_and_nobody_else_does(manager: GPUResourceManager) -> None:
    waiting = WaitingRequests(manager)
    first = Person(waiting, manager, "first")
    first.gate.wait_for_arrival()
    second = Person(waiting, manager, "second")
    assert second.reads("you are next")
    third = Person(waiting, manager, "third")
    assert third.reads("place 2 in the queue")
    assert waiting.cancel_waiting("second", 3600) is True, "it has asked just now, and may be about to listen"
    assert waiting.cancel_waiting("second", 0) is False
    with pytest.raises(RequestCancelled):
        second.worker.result()
    waiting.cancel_waiting("first", 0)
    assert waiting.cancel_waiting("nobody", 0) is False
    for person in (first, third):
        person.gate.open()
        person.worker.result()
    assert waiting._leases == {}


def test_how_much_is_done_is_shown_only_where_it_is_known(manager: GPUResourceManager, workshop: Workshop) -> None:
    workshop.gate = gate = Gate()
    person = Person(WaitingRequests(manager), manager, "anna")
    gate.wait_for_arrival()
    assert person.progress() == ("To the simulated GPU: building", 0.0)
    gate.open()
    assert person.reads("generating")
    person.gate.open()
    person.worker.result()
    assert person.progress() == ("The model is ready; generating", 0.0), "the model leaves meanwhile"


def test_who_goes_on_as_another_keeps_their_place(manager: GPUResourceManager) -> None:
    waiting = WaitingRequests(manager)
    first = Person(waiting, manager, "first")
    first.gate.wait_for_arrival()
    second = Person(waiting, manager, "second")
    assert second.reads("you are next")
    third = Person(waiting, manager, "third")
    assert third.reads("place 2 in the queue")
    waiting.inherit("second", "second again")
    waiting.inherit("third", "third again")
    waiting.cancel_waiting("second", 0)
    waiting.cancel_waiting("third again", 0)
    with pytest.raises(RequestCancelled):
        third.worker.result()
    for person in (first, second):
        person.gate.open()
        person.worker.result()
    assert waiting._leases == {}


def test_without_a_gpu_too_each_hears_their_turn() -> None:
    workshop = Workshop()
    with GPUResourceManager(CpuDevice(), adopt=workshop.adopt) as manager:
        manager.register("tts", workshop.load)
        waiting = WaitingRequests(manager)
        first = Person(waiting, manager, "first")
        assert first.reads("generating")
        second = Person(waiting, manager, "second")
        assert second.reads("you are next")
        first.gate.open()
        first.worker.result()
        assert second.reads("generating")
        second.gate.open()
        second.worker.result()


def test_leases_of_other_models_are_neither_shown_as_ones_own_nor_kept(manager: GPUResourceManager) -> None:
    waiting, other = WaitingRequests(manager), Workshop()
    manager.register("asr", other.load)
    with waiting.watched("tts") as progress:
        with manager.lease("asr"):
            assert waiting._leases[threading.current_thread().name]
            assert progress() is None
        with manager.lease("tts"):
            assert progress() == ("The model is ready; generating", 0.0)
    assert waiting._leases == {}


def test_without_a_manager_nothing_is_said() -> None:
    with WaitingRequests(None).watched("tts"):
        pass
    WaitingRequests(None).cancel_waiting("anybody", 0)
