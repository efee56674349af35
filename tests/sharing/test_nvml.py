"""A card of which the driver's NVML tells the sizes and the processes: with a stand-in that reads a simulated card.

The other processes are real ones.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest
from card_use import Weights, looks, until, use
from nvml_of_card import CardByNvml, NvmlOfCard
from shared_card import MB, OnCard, service

from gpu_manager import GPUResourceManager, RequestTimeout, Sharing, SimulatedDevice, State
from residency.scheduling import leaving
from residency.sharing.board import Board
from residency.status_types import SharingStatus
from residency.workers.isolation import IsolationMode

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs a card shared by processes (Linux)")

CAPACITY = 100 * MB


@pytest.fixture
def card() -> str:
    return f"test-{os.getpid()}-{time.monotonic_ns()}"


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch, card: str) -> NvmlOfCard:
    return NvmlOfCard(monkeypatch, SimulatedDevice(CAPACITY, shared=card), f"GPU-{card}")


@pytest.fixture
def stranger(card: str) -> Iterator[OnCard]:
    """A process that queues nowhere."""
    with service(card, CAPACITY) as process:
        yield process


@pytest.fixture
def manager(nvml: NvmlOfCard, card: str, tmp_path: Path) -> Iterator[GPUResourceManager]:
    sharing = Sharing(headroom_bytes=10 * MB, folder=tmp_path)
    with GPUResourceManager(CardByNvml(CAPACITY, card), keep_warm=600, sharing=sharing) as manager:
        manager.register("tts", lambda: Weights(60 * MB), size_bytes=60 * MB)
        yield manager


def shared(manager: GPUResourceManager) -> SharingStatus:
    status = manager.status()["sharing"]
    assert status is not None
    return status


def watches(manager: GPUResourceManager, tmp_path: Path) -> None:
    """Waits until it has looked at the card with its model there."""
    until(lambda: any(each.marks_presence for each in Board(tmp_path, manager.device.identity).tickets()))


def test_a_model_leaves_for_a_process_that_grows_and_names_it(
    manager: GPUResourceManager, stranger: OnCard, tmp_path: Path
) -> None:
    use(manager)
    watches(manager, tmp_path)
    assert stranger.do("grow", 35 * MB)
    assert manager.wait_for("tts", State.HOST, 60)
    last = shared(manager)["last_yield"]
    assert last is not None
    assert (last["pid"], last["bytes"], last["models"]) == (stranger.pid, 60 * MB, ["tts"])
    assert shared(manager)["holders"] == [{"pid": stranger.pid, "name": last["name"], "bytes": 35 * MB}]
    until(lambda: not Board(tmp_path, manager.device.identity).tickets())


def test_several_processes_are_named_and_the_one_that_grows_is_left_for(
    manager: GPUResourceManager, stranger: OnCard, card: str, tmp_path: Path
) -> None:
    with service(card, CAPACITY) as other:
        assert stranger.do("grow", 20 * MB)
        use(manager)
        watches(manager, tmp_path)
        assert {each["pid"]: each["bytes"] for each in shared(manager)["holders"]} == {stranger.pid: 20 * MB}
        assert other.do("grow", 15 * MB)
        assert manager.wait_for("tts", State.HOST, 60)
        last = shared(manager)["last_yield"]
        assert last is not None
        assert last["pid"] == other.pid
        held = {each["pid"]: each["bytes"] for each in shared(manager)["holders"]}
        assert held == {stranger.pid: 20 * MB, other.pid: 15 * MB}


def test_a_request_waits_for_memory_of_another_process_and_names_it(
    manager: GPUResourceManager, stranger: OnCard
) -> None:
    assert stranger.do("grow", 80 * MB)
    with pytest.raises(RequestTimeout) as caught, manager.lease("tts", timeout=0.5):
        pass
    assert f"20 MB free, and 60 MB are needed; python ({stranger.pid}): 80 MB" in caught.value.en
    assert stranger.do("shrink", 80 * MB)
    use(manager)


@pytest.mark.parametrize("what", ["sizes", "numbers of the host"])
def test_a_driver_that_tells_less_of_the_processes_is_enough_for_the_headroom(
    what: str, manager: GPUResourceManager, nvml: NvmlOfCard, stranger: OnCard, tmp_path: Path
) -> None:
    """As in WSL2 and in containers."""
    nvml.sizes = what != "sizes"
    if what == "numbers of the host":
        nvml.number = lambda pid: pid + (1 << 30)
    use(manager)
    watches(manager, tmp_path)
    assert stranger.do("grow", 35 * MB)
    assert manager.wait_for("tts", State.HOST, 60)
    last = shared(manager)["last_yield"]
    assert last is not None
    assert (last["pid"], last["bytes"]) == (None, 60 * MB)
    assert stranger.do("grow", 35 * MB)
    with pytest.raises(RequestTimeout) as caught:
        manager.lease("tts", timeout=0.5).__enter__()
    assert f"({nvml.number(stranger.pid)}): {'70 MB' if nvml.sizes else '?'}" in caught.value.en


@pytest.mark.parametrize("function", ["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetComputeRunningProcesses"])
@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_NOT_SUPPORTED]
)
def test_requests_are_served_with_what_is_known(
    function: str, code: int, manager: GPUResourceManager, nvml: NvmlOfCard, stranger: OnCard, tmp_path: Path
) -> None:
    nvml.fails[function] = code
    use(manager)
    watches(manager, tmp_path)
    assert shared(manager)["yields"] == 0
    manager.offload()
    use(manager)
    del nvml.fails[function]
    assert stranger.do("grow", 35 * MB)
    assert manager.wait_for("tts", State.HOST, 60), "the driver tells it again"


def test_without_the_list_of_processes_the_headroom_counts(
    manager: GPUResourceManager, nvml: NvmlOfCard, stranger: OnCard, tmp_path: Path
) -> None:
    nvml.fails["nvmlDeviceGetComputeRunningProcesses"] = pynvml.NVML_ERROR_NOT_SUPPORTED
    use(manager)
    watches(manager, tmp_path)
    assert stranger.do("grow", 35 * MB)
    assert manager.wait_for("tts", State.HOST, 60)


def test_a_model_leaves_for_a_program_that_only_draws(
    manager: GPUResourceManager, nvml: NvmlOfCard, stranger: OnCard, tmp_path: Path
) -> None:
    """Such as a game, which computes nothing by CUDA."""
    nvml.draw.add(stranger.pid)
    use(manager)
    watches(manager, tmp_path)
    assert stranger.do("grow", 35 * MB)
    assert manager.wait_for("tts", State.HOST, 60)
    last = shared(manager)["last_yield"]
    assert last is not None
    assert last["pid"] == stranger.pid
    assert [holder["pid"] for holder in shared(manager)["holders"]] == [stranger.pid]


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_an_app_that_is_alone_on_the_card_does_not_leave_for_itself(
    isolation: IsolationMode, nvml: NvmlOfCard, card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container, the driver lists it by a pid of the host."""
    monkeypatch.setattr(leaving, "LONGEST_STAY_S", 0.0)
    nvml.number = lambda pid: pid + (1 << 30)
    sharing, device = Sharing(headroom_bytes=50 * MB, folder=tmp_path), CardByNvml(CAPACITY, card)
    with GPUResourceManager(device, keep_warm=600, sharing=sharing, isolation=isolation) as manager:
        for name, nbytes in (("tts", 50 * MB), ("asr", 10 * MB)):
            manager.register(name, functools.partial(Weights, nbytes), size_bytes=nbytes)
            use(manager, name)
        looks(Board(tmp_path, manager.device.identity), 3)
        assert [each["state"] for each in manager.status()["models"].values()] == ["gpu", "gpu"]
        with service(card, CAPACITY) as stranger:
            assert stranger.do("grow", MB)
            assert manager.wait_for("tts", State.HOST, 60), "now there is another one"
