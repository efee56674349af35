"""Who waits reads why, in the order of the queue; who has gone leaves it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
from fakes import Gate, Worker, Workshop

from gpu_manager import CpuDevice, GPUResourceManager, RequestCancelled
from residency.web.shared.language import en
from residency.web.ui import waiting as waiting_module
from residency.web.ui.waiting import WaitMessages


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What each person was told, by the session that their thread is of."""
    heard: dict[str, list[str]] = {}
    changed = threading.Condition()

    def progress() -> Callable[..., None]:
        whose = threading.current_thread().name

        def localize(share: float, desc: str) -> None:
            with changed:
                heard.setdefault(whose, []).append(desc.partition(" / ")[2])
                changed.notify_all()

        return localize

    monkeypatch.setattr(waiting_module.gr, "Progress", progress)
    monkeypatch.setattr(waiting_module, "session", lambda: threading.current_thread().name)
    heard["await"] = lambda whose, words: _await(changed, heard, whose, words)  # type: ignore[assignment]
    return heard


def _await(changed: threading.Condition, heard: dict[str, list[str]], whose: str, words: str) -> None:
    with changed:
        assert changed.wait_for(lambda: any(words in line for line in heard.get(whose, [])), 30), heard.get(whose)


class Person:
    """Asks for speech in a thread whose name is their session."""

    def __init__(self, waiting: WaitMessages, manager: GPUResourceManager, name: str) -> None:
        self.gate, self._waiting, self._manager = Gate(), waiting, manager
        self.worker = Worker(self._ask, name)

    def _ask(self, name: str) -> None:
        threading.current_thread().name = name
        with self._waiting.told("tts"), self._manager.lease("tts"):
            self.gate.pass_through()


def test_each_hears_their_place_and_then_their_turn(manager: GPUResourceManager, heard: dict[str, Any]) -> None:
    waiting = WaitMessages(manager)
    first = Person(waiting, manager, "first")
    first.gate.wait_for_arrival()
    second = Person(waiting, manager, "second")
    heard["await"]("second", "you are next")
    third = Person(waiting, manager, "third")
    heard["await"]("third", "place 2 in the queue")
    first.gate.open()
    first.worker.result()
    second.gate.wait_for_arrival()
    heard["await"]("second", "generating")
    heard["await"]("third", "you are next")
    assert [event for event in heard["third"] if "place" in event] == ["Waiting; place 2 in the queue"]
    for person in (second, third):
        person.gate.open()
        person.worker.result()


def test_the_model_stays_for_who_waits(manager: GPUResourceManager, heard: dict[str, Any]) -> None:
    waiting, moves = WaitMessages(manager), list[tuple[str, str]]()
    manager.subscribe(lambda event: moves.append((event.source, event.target)) if event.what == "done" else None)
    first = Person(waiting, manager, "first")
    first.gate.wait_for_arrival()
    second = Person(waiting, manager, "second")
    heard["await"]("second", "you are next")
    for person in (first, second):
        person.gate.open()
        person.worker.result()
    manager.close()
    assert moves[:2] == [("released", "gpu"), ("gpu", "cpu")], "it left between two requests"


def test_who_has_gone_leaves_the_queue_and_nobody_else_does(manager: GPUResourceManager, heard: dict[str, Any]) -> None:
    waiting = WaitMessages(manager)
    first = Person(waiting, manager, "first")
    first.gate.wait_for_arrival()
    second = Person(waiting, manager, "second")
    heard["await"]("second", "you are next")
    third = Person(waiting, manager, "third")
    heard["await"]("third", "place 2 in the queue")
    assert waiting.gone("second", 3600) is True, "it has asked just now, and may be about to listen"
    assert waiting.gone("second", 0) is False
    with pytest.raises(RequestCancelled):
        second.worker.result()
    waiting.gone("first", 0)
    assert waiting.gone("nobody", 0) is False
    for person in (first, third):
        person.gate.open()
        person.worker.result()
    assert waiting._leases == {}


def test_how_much_is_done_is_told_only_where_it_is_known(
    manager: GPUResourceManager, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[float, str]] = []
    generating = Gate()

    def localize(share: float, desc: str) -> None:
        told.append((share, desc))
        if "generating" in desc:
            generating.open()

    monkeypatch.setattr(waiting_module.gr, "Progress", lambda: localize)
    monkeypatch.setattr(waiting_module, "localizer", lambda: en)
    with WaitMessages(manager).told("tts"), manager.lease("tts"):
        generating.pass_through()
    assert (0.0, "The model is ready; generating") in told
    assert all(said != again for said, again in itertools.pairwise(told)), "the same is said twice"


def test_who_goes_on_as_another_keeps_their_place(manager: GPUResourceManager, heard: dict[str, Any]) -> None:
    waiting = WaitMessages(manager)
    first = Person(waiting, manager, "first")
    first.gate.wait_for_arrival()
    second = Person(waiting, manager, "second")
    heard["await"]("second", "you are next")
    third = Person(waiting, manager, "third")
    heard["await"]("third", "place 2 in the queue")
    waiting.inherit("second", "second again")
    waiting.inherit("third", "third again")
    waiting.gone("second", 0)
    waiting.gone("third again", 0)
    with pytest.raises(RequestCancelled):
        third.worker.result()
    for person in (first, second):
        person.gate.open()
        person.worker.result()
    assert waiting._leases == {}


def test_without_a_gpu_too_each_hears_their_turn(heard: dict[str, Any]) -> None:
    workshop = Workshop()
    with GPUResourceManager(CpuDevice(), adopt=workshop.adopt) as manager:
        manager.register("tts", workshop.load)
        waiting = WaitMessages(manager)
        first = Person(waiting, manager, "first")
        heard["await"]("first", "generating")
        second = Person(waiting, manager, "second")
        heard["await"]("second", "you are next")
        first.gate.open()
        first.worker.result()
        heard["await"]("second", "generating")
        second.gate.open()
        second.worker.result()
        assert not any("back in main memory" in said for said in heard["first"])


def test_leases_of_other_models_are_neither_told_as_ones_own_nor_kept(
    manager: GPUResourceManager, heard: dict[str, Any]
) -> None:
    waiting, other = WaitMessages(manager), Workshop()
    manager.register("asr", other.load)
    threading.current_thread().name = "first"
    with waiting.told("tts"):
        for name in ("asr", "tts", "asr"):
            with manager.lease(name):
                assert waiting._leases["first"]
    assert waiting._leases == {}
    threading.current_thread().name = "MainThread"


def test_without_a_manager_nothing_is_said() -> None:
    with WaitMessages(None).told("tts"):
        pass
    WaitMessages(None).gone("anybody", 0)
