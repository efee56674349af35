"""Objects that move themselves: called in order, measured, never half-moved, and nothing is left of them."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.errors import DeviceOutOfMemory, SelfMoveFailed, SelfMoveFreedNothing, WorkerEnded

sys.path.append(str(Path(__file__).parents[1] / "support" / "stand_in_vllm"))

import vllm

MB = 1 << 20
HELD = vllm.WEIGHT_BYTES + vllm.CACHE_BYTES


class Engine:
    """An engine whose language model is in a worker process, and whose vocoder is here."""

    def __init__(self, **arguments: Any) -> None:
        self.vocoder = torch.nn.Linear(512, 512)
        self.llm = vllm.LLM("a folder", **{"enable_sleep_mode": True, **arguments})

    def speak(self) -> list[int]:
        answer = self.llm.generate([{"prompt_token_ids": [1, 2, 3]}], vllm.SamplingParams())
        return [*answer[0].outputs[0].token_ids, int(self.vocoder.weight.sum() * 1e6)]


@pytest.fixture
def manager() -> Iterator[GPUResourceManager]:
    with GPUResourceManager(SimulatedDevice(1 << 30), keep_warm=-1) as manager:
        yield manager


@pytest.fixture
def without_checkpoints() -> Iterator[GPUResourceManager]:
    """A worker process that cannot be offloaded part by part is not checkpointed either."""
    with GPUResourceManager(SimulatedDevice(1 << 30), keep_warm=-1, residue="keep") as manager:
        yield manager


def model(manager: GPUResourceManager) -> dict[str, Any]:
    return dict(manager.status()["models"]["tts"])


def workers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "worker.py" in " ".join(_command(child))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return [] if process.status() == psutil.STATUS_ZOMBIE else process.cmdline()
    except psutil.NoSuchProcess:
        return []


def kill_worker() -> None:
    """Returns after its end; nobody has collected its exit code."""
    (worker,) = workers()
    fd = os.pidfd_open(worker.pid)
    worker.kill()
    select.select([fd], [], [])
    os.close(fd)


def private_bytes(process: psutil.Process) -> int:
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Private_Dirty"))


def speak(manager: GPUResourceManager) -> list[int]:
    with manager.lease("tts") as engine:
        answer: list[int] = engine.speak()
        return answer


def build(deaf: bool = False, **arguments: Any) -> Engine:
    """``deaf``: its worker does not end by itself."""
    torch.manual_seed(0)
    engine = Engine(**arguments)
    if deaf:
        engine.llm.llm_engine.engine_core.shutdown = lambda: None
    return engine


def load(manager: GPUResourceManager, fault: tuple[str, str] | None = None, **arguments: Any) -> list[int]:
    """Returns what it says before a fault."""
    manager.register("tts", partial(build, **arguments))
    said = speak(manager)
    with manager.lease("tts") as engine:
        engine.llm.fault = fault
    return said


def test_a_worker_process_is_put_to_sleep_and_says_the_same_afterwards(manager: GPUResourceManager) -> None:
    said = load(manager)
    (worker,) = workers()
    there = model(manager)
    assert there["state"] == "gpu"
    assert there["device_bytes"] == pytest.approx(private_bytes(worker) + 512 * 513 * 4, abs=MB)
    assert manager.offload("tts")
    away = model(manager)
    assert (away["state"], away["device_bytes"]) == ("cpu", 0)
    assert away["host_bytes"] == pytest.approx(private_bytes(worker) + 512 * 513 * 4, abs=MB)
    assert private_bytes(worker) < there["device_bytes"] - vllm.CACHE_BYTES // 2
    assert away["outside_bytes"] == 0, "the worker is accounted for"
    assert speak(manager) == said
    assert model(manager)["device_bytes"] == pytest.approx(there["device_bytes"], abs=MB)
    assert manager.device.ledger_bytes == 512 * 513 * 4


def test_a_release_ends_the_worker_process(manager: GPUResourceManager) -> None:
    said = load(manager)
    manager.release("tts")
    assert workers() == []
    assert (model(manager)["device_bytes"], model(manager)["host_bytes"]) == (0, 0)
    assert manager.device.memory().free_bytes == 1 << 30
    assert speak(manager) == said, "built anew"


def test_a_worker_that_does_not_end_by_itself_is_killed(manager: GPUResourceManager) -> None:
    load(manager, deaf=True)
    manager.release("tts")
    assert workers() == []


@pytest.mark.in_process("collects the exit code of a child of the test")
def test_a_worker_that_multiprocessing_started_leaves_no_zombie(manager: GPUResourceManager) -> None:
    """As vLLM's shutdown leaves it: told to end, and its exit code not collected."""

    class Ends:
        def __init__(self) -> None:
            self.child = multiprocessing.get_context("fork").Process(target=signal.pause, daemon=True)
            self.child.start()

        def offload_from_gpu(self) -> None: ...
        def restore_to_gpu(self) -> None: ...

        def release_from_gpu(self) -> None:
            self.child.kill()
            os.waitid(os.P_PID, self.child.pid or 0, os.WEXITED | os.WNOWAIT)

    built = []
    manager.register("tts", lambda: built.append(Ends()) or built[-1])
    for _ in range(2):
        with manager.lease("tts"):
            child = built.pop().child
        manager.release("tts")
        assert not psutil.pid_exists(child.pid)
        assert child.exitcode == -signal.SIGKILL, "multiprocessing knows it, too"


def test_closing_the_manager_leaves_no_process() -> None:
    with GPUResourceManager(SimulatedDevice(1 << 30)) as manager:
        load(manager)
        assert len(workers()) == 1
    assert workers() == []


@pytest.mark.parametrize("moment", ["sleep", "wake_up"])
def test_a_worker_that_dies_in_a_move_is_replaced_for_the_next_request(
    manager: GPUResourceManager, moment: str
) -> None:
    said = load(manager, (moment, "die"))
    if moment == "wake_up":
        manager.offload("tts")
    if moment == "sleep":
        with pytest.raises(WorkerEnded, match=r"A worker process of \.llm has ended"):
            manager.offload("tts")
    else:
        with pytest.raises(WorkerEnded, match=r"A worker process of \.llm has ended"):
            speak(manager)
    assert speak(manager) == said
    assert len(workers()) == 1


def test_a_worker_that_dies_in_a_request_is_replaced_for_the_next_one(manager: GPUResourceManager) -> None:
    said = load(manager, ("generate", "die"))
    with pytest.raises(vllm.EngineDeadError):
        speak(manager)
    assert speak(manager) == said
    assert len(workers()) == 1


@pytest.mark.parametrize("isolation", ["none", "process"], indirect=True)
@pytest.mark.parametrize("away", [False, True])
def test_a_worker_that_is_killed_while_its_model_is_idle_costs_no_request(
    manager: GPUResourceManager, away: bool
) -> None:
    said = load(manager)
    if away:
        manager.offload("tts")
    kill_worker()
    assert speak(manager) == said, "built anew first"
    assert len(workers()) == 1


def test_what_is_left_of_an_engine_leaves_the_gpu_when_its_worker_was_killed(manager: GPUResourceManager) -> None:
    said = load(manager)
    kill_worker()
    with pytest.raises(WorkerEnded):
        manager.offload("tts")
    manager.release("tts")  # waits for the release that follows by itself
    assert manager.device.ledger_bytes == 0
    assert model(manager)["state"] == "released"
    assert workers() == []
    assert speak(manager) == said


def test_a_worker_of_a_load_that_fails_is_ended(manager: GPUResourceManager) -> None:
    def build() -> Engine:
        engine = Engine()
        raise RuntimeError(f"the vocoder of {type(engine).__name__} cannot be read")

    manager.register("tts", build)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="vocoder"):
            speak(manager)
        assert workers() == []


def test_two_managers_account_for_their_own_workers_only(manager: GPUResourceManager) -> None:
    with GPUResourceManager(SimulatedDevice(1 << 30), keep_warm=-1) as other:
        load(manager)
        load(other)
        said, there = speak(manager), model(manager)["device_bytes"]
        other.offload("tts")
        assert model(manager)["device_bytes"] == pytest.approx(there, abs=MB)
        assert (model(manager)["outside_bytes"], model(other)["outside_bytes"]) == (0, 0)
        manager.release("tts")
        assert len(workers()) == 1
        assert speak(other) == said
    assert workers() == []


def test_an_error_in_wake_up_is_shown_and_the_engine_is_built_anew(manager: GPUResourceManager) -> None:
    said = load(manager, ("wake_up", "error"))
    manager.offload("tts")
    with pytest.raises(SelfMoveFailed, match=r"llm cannot be moved: an error of the worker"):
        speak(manager)
    assert speak(manager) == said
    assert len(workers()) == 1


def test_an_error_in_sleep_leaves_the_engine_where_it_was(without_checkpoints: GPUResourceManager) -> None:
    manager = without_checkpoints
    said = load(manager, ("sleep", "error"))
    there = model(manager)["device_bytes"]
    with pytest.raises(SelfMoveFailed):
        manager.offload("tts")
    assert model(manager)["state"] == "gpu"
    assert model(manager)["device_bytes"] == pytest.approx(there, abs=MB)
    assert speak(manager) == said


def test_a_wake_up_that_finds_no_room_moves_nothing_and_the_next_request_works(manager: GPUResourceManager) -> None:
    said, built = load(manager), workers()
    manager.offload("tts")
    manager.device.report_outside(1, (1 << 30) - HELD // 2)
    with pytest.raises(DeviceOutOfMemory):
        speak(manager)
    assert (model(manager)["state"], model(manager)["device_bytes"]) == ("cpu", 0)
    manager.device.report_outside(1, 0)
    assert speak(manager) == said
    assert workers() == built, "it was not built anew"


def test_a_worker_that_reports_a_full_card_goes_back_to_sleep(manager: GPUResourceManager) -> None:
    said, built = load(manager, ("wake_up", "full")), workers()
    manager.offload("tts")
    assert speak(manager) == said, "the second attempt"
    assert workers() == built


def test_a_sleep_that_frees_nothing_is_no_offload(without_checkpoints: GPUResourceManager) -> None:
    manager = without_checkpoints
    said = load(manager, enable_sleep_mode=False)
    with pytest.raises(SelfMoveFreedNothing, match="enable_sleep_mode=True"):
        manager.offload("tts")
    there = model(manager)
    assert there["state"] == "gpu"
    assert there["device_bytes"] > HELD
    assert speak(manager) == said
    manager.release("tts")
    assert workers() == []


def test_a_worker_that_the_engine_starts_later_is_found_at_the_next_offload(manager: GPUResourceManager) -> None:
    class Late(Engine):
        def __init__(self) -> None:
            self.llm: Any = None

        def speak(self) -> list[int]:
            self.llm = self.llm or vllm.LLM("a folder", enable_sleep_mode=True)
            return list(self.llm.generate([{"prompt_token_ids": [1]}], vllm.SamplingParams())[0].outputs[0].token_ids)

    manager.register("tts", Late)
    said = speak(manager)
    manager.offload("tts")
    assert model(manager)["host_bytes"] >= vllm.WEIGHT_BYTES
    assert speak(manager) == said
    manager.release("tts")
    assert workers() == []
