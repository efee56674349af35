"""A shared card and models in worker processes: these are no other processes on the card."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from card_use import Weights, looks, until, use
from nvml_of_card import CardByNvml, NvmlOfCard
from shared_card import MB, OnCard, service
from worker_engines import LINUX, Gate, started

from gpu_manager import GPUResourceManager, Sharing, SimulatedDevice, State
from residency.scheduling import leaving
from residency.sharing.board import Board
from residency.status_types import SharingStatus

pytestmark = LINUX

CAPACITY = 100 * MB


@pytest.fixture
def card() -> str:
    return f"test-{os.getpid()}-{time.monotonic_ns()}"


@pytest.fixture(params=["simulated", "nvml"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, card: str) -> SimulatedDevice:
    books = SimulatedDevice(CAPACITY, shared=card)
    if request.param == "simulated":
        return books
    NvmlOfCard(monkeypatch, books, f"GPU-{card}")
    return CardByNvml(CAPACITY, card)


@pytest.fixture
def manager(device: SimulatedDevice, tmp_path: Path) -> Iterator[GPUResourceManager]:
    sharing = Sharing(headroom_bytes=50 * MB, folder=tmp_path)
    with GPUResourceManager(device, isolation="process", keep_warm=600, sharing=sharing) as manager:
        yield manager


@pytest.fixture
def start(card: str, device: SimulatedDevice, tmp_path: Path) -> Iterator[Callable[..., OnCard]]:
    """Starts programs on the card, which queue for it in the same folder."""
    with ExitStack() as stack:

        def begin() -> OnCard:
            other = service(card, CAPACITY, 60 * MB, identity=device.identity, folder=str(tmp_path))
            return stack.enter_context(other)

        yield begin


def shared(manager: GPUResourceManager) -> SharingStatus:
    status = manager.status()["sharing"]
    assert status is not None
    return status


def worker(manager: GPUResourceManager) -> int:
    status = manager.status()["models"]["tts"]["worker"]
    assert status is not None
    return status["pid"]


def test_a_worker_is_no_other_process_on_the_card(manager: GPUResourceManager, tmp_path: Path) -> None:
    """Its model takes more than is left, and less than the headroom is free: nobody else needs it."""
    board = Board(tmp_path, manager.device.identity)
    manager.register("tts", functools.partial(Weights, 60 * MB))
    for _ in range(3):
        use(manager)
        assert dict(manager.device.holders()).get(worker(manager), 0) >= 60 * MB
        looks(board, 3)
        assert manager.status()["models"]["tts"]["state"] == "gpu"
        assert not any(each.is_strangers for each in board.tickets())
        assert shared(manager)["holders"] == []
        manager.release()
    assert shared(manager)["yields"] == 0


def load_slowly(device: SimulatedDevice, gate: Gate) -> Weights:
    device.charge(60 * MB)
    gate()
    device.refund(60 * MB)
    return Weights(60 * MB)


def test_a_worker_that_loads_its_first_model_is_no_other_process(
    manager: GPUResourceManager, device: SimulatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not known yet which model it has."""
    monkeypatch.setattr(leaving, "LONGEST_STAY_S", 0.0)
    gate, board = Gate(tmp_path), Board(tmp_path, manager.device.identity)
    manager.register("asr", functools.partial(Weights, 20 * MB))
    manager.register("tts", functools.partial(load_slowly, device, gate))
    use(manager, "asr")
    loading = started(use, manager)
    try:
        pid = gate.reached()
        assert dict(device.holders())[pid] >= 60 * MB
        looks(board, 3)
        assert manager.status()["models"]["asr"]["state"] == "gpu"
        assert not any(each.is_strangers for each in board.tickets())
        assert shared(manager)["holders"] == []
        gate.open()
    finally:
        gate.free()
    loading.result(60)
    looks(board, 3)
    assert manager.status()["models"]["asr"]["state"] == "gpu"
    assert shared(manager)["yields"] == 0


def test_the_model_of_a_worker_leaves_for_others(manager: GPUResourceManager, start: Callable[..., OnCard]) -> None:
    stranger, app = start(), start()
    manager.register("tts", functools.partial(Weights, 60 * MB))
    use(manager)
    pid = worker(manager)
    assert stranger.do("grow", 35 * MB)
    assert manager.wait_for("tts", State.HOST, 60)
    last = shared(manager)["last_yield"]
    assert last is not None
    assert last["bytes"] == manager.status()["models"]["tts"]["host_bytes"]
    assert {each["pid"] for each in shared(manager)["holders"]} == {stranger.pid}
    assert stranger.do("shrink", 35 * MB)
    use(manager)
    assert worker(manager) == pid
    assert app.do("take") == 255, "it has left for its request"
    app.do("end")
    until(lambda: manager.status()["models"]["tts"]["state"] == "cpu")
    use(manager)
    assert app.state() == "cpu"
