"""Apps in containers, whose pids are not those that the driver names here: with pid namespaces, and a stand-in NVML."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from card_use import Weights, until, use
from nvml_of_card import CardByNvml, NvmlOfCard
from shared_card import CONTAINER, MB, OnCard, service

from gpu_manager import GPUResourceManager, Sharing, SimulatedDevice, State
from residency.sharing.board import Board
from residency.sharing.processes import family_of, identity_of, name_of


def _has_containers() -> bool:
    try:
        return subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not _has_containers(), reason="needs pid namespaces (unshare)")

CAPACITY = 100 * MB


@pytest.fixture
def card() -> str:
    return f"test-{os.getpid()}-{time.monotonic_ns()}"


@pytest.fixture
def books(card: str) -> SimulatedDevice:
    return SimulatedDevice(CAPACITY, shared=card)


@pytest.fixture
def manager(
    monkeypatch: pytest.MonkeyPatch, books: SimulatedDevice, card: str, tmp_path: Path
) -> Iterator[GPUResourceManager]:
    NvmlOfCard(monkeypatch, books, f"GPU-{card}")
    sharing = Sharing(headroom_bytes=10 * MB, folder=tmp_path)
    with GPUResourceManager(CardByNvml(CAPACITY, card), keep_warm=600, sharing=sharing) as manager:
        manager.register("tts", lambda: Weights(60 * MB), size_bytes=60 * MB)
        yield manager


@pytest.fixture
def app(card: str, tmp_path: Path) -> Iterator[OnCard]:
    """An app of this project in a container; the test tells the driver's books what it holds."""
    with service(None, CAPACITY, identity=f"GPU-{card}", contained=True, folder=str(tmp_path)) as app:
        app.do("status")
        yield app


def inside(process: OnCard) -> int:
    """The program, by its pid here."""
    (program,) = psutil.Process(process.pid).children()
    return program.pid


def test_an_app_in_a_container_is_a_peer_and_no_stranger(
    manager: GPUResourceManager, app: OnCard, books: SimulatedDevice, tmp_path: Path
) -> None:
    board = Board(tmp_path, manager.device.identity)
    app.do("take")
    use(manager)
    until(lambda: len({each.pid for each in board.tickets() if each.marks_presence}) == 2)
    status = manager.status()["sharing"]
    assert status is not None
    assert status["peers"] == [1]
    books.report_outside(inside(app), 35 * MB)  # its model has come, with room
    assert manager.wait_for("tts", State.HOST, 60), "less than the headroom is free"
    status = manager.status()["sharing"]
    assert status is not None
    assert status["last_yield"] is not None
    assert status["last_yield"]["pid"] is None, "it has no second place in the queue"
    assert not any(each.is_strangers for each in board.tickets())
    assert [holder["pid"] for holder in status["holders"]] == [inside(app)]


def test_another_program_with_the_same_pid_in_its_container_is_a_stranger(
    manager: GPUResourceManager, app: OnCard, books: SimulatedDevice, card: str, tmp_path: Path
) -> None:
    board = Board(tmp_path, manager.device.identity)
    with service(None, CAPACITY, contained=True) as stranger:
        stranger.do("status")
        app.do("take")
        use(manager)
        until(lambda: len({each.pid for each in board.tickets() if each.marks_presence}) == 2)
        books.report_outside(inside(stranger), 35 * MB)
        assert manager.wait_for("tts", State.HOST, 60)
        status = manager.status()["sharing"]
        assert status is not None
        assert status["last_yield"] is not None
        assert status["last_yield"]["pid"] == inside(stranger)


def test_a_process_in_a_container_has_the_identity_that_it_gives_itself(app: OnCard) -> None:
    pid = inside(app)
    _, started = identity_of(pid)
    assert {(pid, started), (1, started)} <= family_of(pid)
    assert identity_of(app.pid) in family_of(pid), "its parents are in the family"
    assert family_of(1 << 30) == {(1 << 30, 0)}
    assert name_of(pid, started) == psutil.Process(pid).name()
    assert name_of(1, started) == "?", "here, it is another process"
