"""One card for several processes: real processes on one simulated card with a name."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from card_use import Weights, looks, until, use
from fakes import comes_to
from shared_card import MB, OnCard, service

from gpu_manager import GPUResourceManager, RequestTimeout, Sharing, SimulatedDevice, State
from residency.clock import ManualClock
from residency.devices.named_cards import path_of
from residency.scheduling.leaving import LONGEST_STAY_S, Leaving
from residency.sharing.board import Board
from residency.sharing.tickets import PRESENCE, Ticket
from residency.status_types import QueuedMove

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs a card shared by processes (Linux)")

CAPACITY = 100 * MB


@pytest.fixture
def card() -> str:
    return f"test-{os.getpid()}-{time.monotonic_ns()}"


@pytest.fixture
def start(card: str, tmp_path: Path) -> Iterator[Callable[..., OnCard]]:
    """Starts programs on the card of the test, which queue in its folder."""
    with ExitStack() as stack:

        def begin(nbytes: int = 60 * MB, **options: Any) -> OnCard:
            options.setdefault("folder", str(tmp_path))
            return stack.enter_context(service(card, CAPACITY, nbytes, **options))

        yield begin


@pytest.fixture
def manager(card: str, tmp_path: Path) -> Iterator[GPUResourceManager]:
    """The manager of this process on the same card: a model of 60 MB that stays for ten minutes."""
    sharing = Sharing(headroom_bytes=10 * MB, folder=tmp_path)
    with GPUResourceManager(SimulatedDevice(CAPACITY, shared=card), keep_warm=600, sharing=sharing) as manager:
        manager.register("tts", lambda: Weights(60 * MB))
        yield manager


def layer_by_layer(manager: GPUResourceManager, nbytes: int) -> Weights:
    """Loads as an engine does that finds out at each layer whether it fits."""
    taken_bytes = 0
    try:
        while taken_bytes < nbytes:
            manager.device.charge(5 * MB)
            taken_bytes += 5 * MB
    finally:
        manager.device.refund(taken_bytes)
    return Weights(nbytes)


def queue(manager: GPUResourceManager) -> list[QueuedMove]:
    status = manager.status()["sharing"]
    assert status
    return status["queue"]


class Queue(Board):
    """The moves that wait or run on a card, without the marks of processes that are there."""

    def __init__(self, folder: Path, card: str) -> None:
        super().__init__(folder, f"simulated-{card}")

    def moves(self) -> list[str]:
        return [ticket.key for ticket in self.tickets() if not ticket.marks_presence]


def watched(tmp_path: Path, card: str) -> bool:
    """Returns whether a process with a model on the card has looked at it."""
    return any(ticket.key.startswith("on-") for ticket in Queue(tmp_path, card).tickets())


# -- others without this project ------------------------------------------------------------------------------------


def test_an_idle_model_leaves_for_a_process_that_grows(
    manager: GPUResourceManager, start: Callable[..., OnCard], tmp_path: Path, card: str
) -> None:
    stranger = start()
    use(manager)
    until(lambda: watched(tmp_path, card))
    assert stranger.do("grow", 35 * MB)
    assert manager.wait_for("tts", State.HOST, 60)
    assert manager.device.memory().free_bytes == 65 * MB
    status = manager.status()["sharing"]
    assert status is not None
    assert status["yields"] == 1
    assert status["last_yield"] is not None
    assert (status["last_yield"]["pid"], status["last_yield"]["bytes"]) == (stranger.pid, 60 * MB)
    assert status["last_yield"]["models"] == ["tts"]


@pytest.mark.parametrize("gives_back", [True, False])
def test_a_process_that_needs_no_more_keeps_no_place_in_the_queue(
    gives_back: bool, manager: GPUResourceManager, start: Callable[..., OnCard], tmp_path: Path, card: str
) -> None:
    stranger = start()
    use(manager)
    until(lambda: watched(tmp_path, card))
    assert stranger.do("grow", 35 * MB)
    assert manager.wait_for("tts", State.HOST, 60)
    if gives_back:
        assert stranger.do("shrink", 35 * MB)
    until(lambda: not Queue(tmp_path, card).tickets())


def test_a_model_in_use_stays(manager: GPUResourceManager, start: Callable[..., OnCard]) -> None:
    stranger = start()
    with manager.lease("tts"):
        assert stranger.do("grow", 35 * MB)
        assert not manager.wait_for("tts", State.HOST, 0.5)
        assert stranger.do("grow", 30 * MB) is False
    assert manager.wait_for("tts", State.HOST, 60)
    assert stranger.do("grow", 30 * MB)


def test_a_request_waits_for_memory_that_others_hold_and_says_who(
    manager: GPUResourceManager, start: Callable[..., OnCard]
) -> None:
    stranger = start()
    use(manager)
    manager.offload()
    assert stranger.do("grow", 80 * MB)
    with pytest.raises(RequestTimeout) as caught, manager.lease("tts", timeout=0.3):
        pass
    assert f"({stranger.pid}): 80 MB" in caught.value.en
    assert f"({stranger.pid})" in caught.value.zh
    assert manager.wait_for("tts", State.HOST, 60)
    assert manager.status()["models"]["tts"]["last_error"] is None
    assert stranger.do("shrink", 80 * MB)
    use(manager)


def test_a_first_load_that_finds_the_card_full_waits(
    manager: GPUResourceManager, start: Callable[..., OnCard], card: str
) -> None:
    stranger = start()
    assert stranger.do("grow", 80 * MB)
    manager.register("asr", lambda: Weights(60 * MB))
    waiting: list[str] = []
    manager.subscribe(lambda event: waiting.append(event.phase) if event.phase == "waiting" else None)
    with pytest.raises(RequestTimeout, match="80 MB"), manager.lease("asr", timeout=5):
        pass
    assert waiting
    assert stranger.do("shrink", 80 * MB)
    use(manager, "asr")


@pytest.mark.in_process("its loader has locks of this process")
def test_a_first_load_is_tried_again_as_long_as_others_hold_a_part_of_the_card(
    manager: GPUResourceManager, start: Callable[..., OnCard]
) -> None:
    stranger, held_bytes, tries = start(), 95 * MB, 0
    assert stranger.do("grow", held_bytes)

    def load() -> Weights:
        nonlocal tries
        tries += 1
        return layer_by_layer(manager, 60 * MB)

    manager.register("asr", load)
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(use, manager, "asr")
        while not request.done():
            status = manager.status()["sharing"]
            assert status
            lacking_bytes = sum(ticket["wanted_bytes"] for ticket in status["queue"]) - (CAPACITY - held_bytes)
            if status["queue"] and not status["queue"][0]["claimed"] and 0 < lacking_bytes <= held_bytes:
                assert stranger.do("shrink", lacking_bytes)
                held_bytes -= lacking_bytes
        request.result()
    assert tries > 2


def test_a_first_load_fails_if_others_hold_next_to_nothing(
    manager: GPUResourceManager, start: Callable[..., OnCard]
) -> None:
    assert start().do("grow", 5 * MB)
    manager.register("asr", lambda: Weights(CAPACITY))
    with pytest.raises(MemoryError), manager.lease("asr"):
        pass


def test_a_first_load_that_fits_beside_what_others_keep_is_not_held_up(
    manager: GPUResourceManager, start: Callable[..., OnCard]
) -> None:
    stranger = start()
    assert stranger.do("grow", 80 * MB)
    manager.register("asr", lambda: layer_by_layer(manager, 70 * MB))
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(use, manager, "asr")
        until(lambda: queue(manager) and not queue(manager)[0]["claimed"])
        assert stranger.do("shrink", 65 * MB)
        request.result(60)


def test_a_first_load_does_not_wait_for_memory_of_its_own_process(
    manager: GPUResourceManager, start: Callable[..., OnCard]
) -> None:
    assert start().do("grow", 5 * MB)
    manager.configure("tts", keep_warm=-1)
    use(manager)
    manager.register("asr", lambda: layer_by_layer(manager, 60 * MB))
    with pytest.raises(MemoryError), manager.lease("asr", timeout=60):
        pass


def test_a_model_in_use_is_not_the_first_to_leave(manager: GPUResourceManager) -> None:
    leaving = Leaving(manager._dispatcher)
    use(manager)
    with manager.lease("tts"):
        until(lambda: leaving.leave(60 * MB, time.monotonic())[0])  # once its minimum stay has ended
        assert leaving.offers() == {}
    assert manager.wait_for("tts", State.HOST, 60)


def test_a_planned_return_takes_no_memory_that_was_freed_for_others(
    manager: GPUResourceManager, start: Callable[..., OnCard]
) -> None:
    stranger = start()
    use(manager)
    assert stranger.do("grow", 35 * MB)
    assert manager.wait_for("tts", State.HOST, 60)
    manager.warm("tts")
    assert manager.wait_for("tts", State.DEVICE, 1) is False
    assert stranger.do("grow", 60 * MB)
    assert stranger.do("shrink", 95 * MB)
    use(manager)


def test_nobody_is_left_for_without_headroom(card: str, start: Callable[..., OnCard], tmp_path: Path) -> None:
    with GPUResourceManager(SimulatedDevice(CAPACITY, shared=card), keep_warm=600) as manager:
        manager.register("tts", lambda: Weights(60 * MB))
        use(manager)
        assert start().do("grow", 40 * MB)
        assert manager.wait_for("tts", State.HOST, 0.5) is False
        assert manager.status()["sharing"] is None


@pytest.mark.parametrize(("load_s", "stays_s"), [(8.0, 8.0), (100.0, LONGEST_STAY_S)])
@pytest.mark.parametrize("ours", [False, True], ids=["a stranger", "a process of this project"])
def test_a_model_that_has_just_come_stays_as_long_as_its_move_took(
    load_s: float, stays_s: float, ours: bool, start: Callable[..., OnCard], card: str, tmp_path: Path
) -> None:
    clock = ManualClock()
    sharing = Sharing(headroom_bytes=10 * MB, folder=tmp_path)

    def load() -> Weights:
        clock.advance(load_s)
        return Weights(60 * MB)

    device = SimulatedDevice(CAPACITY, shared=card)
    with GPUResourceManager(
        device, keep_warm=600, sharing=sharing, clock=clock, isolation="none"
    ) as manager:  # fmt: skip
        manager.register("tts", load)
        other = start()
        use(manager)
        until(lambda: watched(tmp_path, card))
        if ours:
            other.send("take")
            until(lambda: Queue(tmp_path, card).moves())
        else:
            assert other.do("grow", 35 * MB)
        for pause_s in (0.0, stays_s - 0.1):
            clock.advance(pause_s)
            looks(Queue(tmp_path, card), 3)
            assert manager.status()["models"]["tts"]["state"] == "gpu", "its minimum stay has not ended"
        clock.advance(0.2)
        assert comes_to(manager, clock, State.HOST)
        assert not ours or other.answer() == 255


# -- processes of this project ----------------------------------------------------------------------------------------


def test_an_idle_model_leaves_for_a_request_of_another_process(
    manager: GPUResourceManager, start: Callable[..., OnCard]
) -> None:
    other = start()
    use(manager)
    other.do("take")
    other.do("end")
    assert manager.status()["models"]["tts"]["state"] == "cpu"
    use(manager)
    assert other.state() == "cpu"


@pytest.mark.in_process("its loader has locks of this process")
def test_bytes_of_a_move_that_are_on_the_card_are_not_kept_free_a_second_time(
    manager: GPUResourceManager, start: Callable[..., OnCard]
) -> None:
    half_there, goes_on = threading.Event(), threading.Event()

    def load() -> Weights:
        manager.device.charge(50 * MB)
        half_there.set()
        assert goes_on.wait(60)
        manager.device.refund(50 * MB)
        return Weights(60 * MB)

    manager.register("asr", load, size_bytes=60 * MB)
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(use, manager, "asr")
        assert half_there.wait(60)
        assert start(30 * MB).do("take", 30) == 255
        goes_on.set()
        request.result()


@pytest.mark.parametrize("idle", ["first", "second"])
def test_only_the_model_that_is_idle_longest_leaves_for_a_request_of_a_third_process(
    idle: str, start: Callable[..., OnCard]
) -> None:
    services = {"first": start(30 * MB), "second": start(30 * MB)}
    longest, other = services.pop(idle), services.popitem()[1]
    for command in ("take", "end", "offload", "take", "end"):  # a model stays at least as long as its last move took
        longest.do(command)
        other.do(command)
    third = start(60 * MB)
    assert third.do("take") == 255
    assert (longest.state(), other.state()) == ("cpu", "gpu")


def test_requests_are_served_in_order_of_arrival_across_processes(
    manager: GPUResourceManager, start: Callable[..., OnCard], card: str, tmp_path: Path
) -> None:
    first, second = start(), start()
    board = Queue(tmp_path, card)
    with manager.lease("tts"):
        first.send("take")
        until(lambda: len(board.moves()) == 1)
        second.send("take", 3)
        assert "before it in the queue for the GPU: 1" in second.answer()
        second.send("take")
        until(lambda: len(board.moves()) == 2)
    assert first.answer() == 255
    assert [ticket.pid for ticket in board.tickets() if ticket.model and not ticket.claimed] == [second.pid]
    first.do("end")
    assert second.answer() == 255
    second.do("end")
    assert first.state() == "cpu"
    assert board.moves() == []


def test_processes_of_two_containers_may_have_the_same_number(
    manager: GPUResourceManager, card: str, tmp_path: Path
) -> None:
    now_s = time.monotonic()
    keys = (f"{PRESENCE}{'a' * 32}", f"{PRESENCE}{'b' * 32}", f"{PRESENCE}{'b' * 32}-tts")  # the last: an idle model
    there = tuple(Ticket(key, "", os.getpid(), now_s, 0, now_s, True) for key in keys)
    Queue(tmp_path, card).change(lambda tickets: ((*tickets, *there), None))
    use(manager)
    until(lambda: watched(tmp_path, card))
    status = manager.status()["sharing"]
    assert status is not None
    assert status["peers"] == [os.getpid()] * 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_process_that_has_ended_or_stands_still_blocks_nobody(
    number: signal.Signals, manager: GPUResourceManager, start: Callable[..., OnCard], card: str, tmp_path: Path
) -> None:
    first, second = start(), start()
    with manager.lease("tts"):
        first.send("take")
        until(lambda: len(Queue(tmp_path, card).moves()) == 1)
        second.send("take")
        until(lambda: len(Queue(tmp_path, card).moves()) == 2)

        def end_or_stop(books: object) -> None:
            os.kill(first.pid, number)
            until(lambda: psutil.Process(first.pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED))

        # Not while it has the books of the simulated card, which then nobody could read; a driver has no such lock.
        manager.device.ledger.locked(end_or_stop)  # type: ignore[attr-defined]
    assert second.answer() == 255
    if number is signal.SIGSTOP:
        os.kill(first.pid, signal.SIGCONT)
        second.do("end")
        assert first.answer() == 255


def test_a_manager_that_is_closed_leaves_nothing_in_the_queue(
    manager: GPUResourceManager, tmp_path: Path, card: str
) -> None:
    use(manager)
    until(lambda: watched(tmp_path, card))
    manager.close()
    assert Queue(tmp_path, card).tickets() == ()


def test_other_users_may_change_the_queue_and_undo_a_transaction(tmp_path: Path, card: str) -> None:
    before = os.umask(0o077)
    try:
        board = Queue(tmp_path, card)
        board.change(lambda tickets: (tickets, None))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.iterdir() if path.name.startswith(board.path.name)]
    assert len(files) == 2
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666}


def test_without_the_queue_requests_are_served_all_the_same(
    manager: GPUResourceManager, card: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    board = Queue(tmp_path, card)
    board.tickets()
    with closing(sqlite3.connect(board.path)) as frozen:
        frozen.execute("begin exclusive")
        use(manager)
    assert "The queue for the GPU cannot be used at the moment" in caplog.text
    board.path.write_text("no database at all, and longer than the header of one " * 10)
    manager.offload()
    use(manager)


def test_a_simulated_card_with_a_name_ends_with_its_last_process(card: str, start: Callable[..., OnCard]) -> None:
    path = path_of(card)
    first, second = start(), start()
    first.do("grow", MB)
    second.do("grow", MB)
    for process in (first, second):
        assert path.exists()
        process.process.communicate(timeout=60)
    assert not path.exists()
