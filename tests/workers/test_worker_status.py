"""What the status says of worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from app_process import wait_until
from fakes import Workshop

from gpu_manager import GPUResourceManager, SimulatedDevice, State
from residency.clock import ManualClock
from residency.devices.host_probes import sample
from residency.status_types import WorkerStatus
from residency.web.ui import views

MB = 1 << 20


class Engine:
    """Has a weight, and main memory of its own; ``child`` is a process that it started."""

    def __init__(self, extra_bytes: int = 0, child: bool = False) -> None:
        self.weight = torch.ones(8 * MB, dtype=torch.uint8)
        self.extra = bytearray(os.urandom(MB)) * (extra_bytes // MB)
        self.child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) if child else None

    def child_pid(self) -> int:
        assert self.child is not None
        return self.child.pid

    def total(self) -> int:
        return int(self.weight.long().sum())


@pytest.fixture(scope="module")
def isolated() -> Iterator[GPUResourceManager]:
    device = SimulatedDevice(1 << 30, context_bytes=100 * MB)
    with GPUResourceManager(device, isolation="process", residue="keep", clock=ManualClock()) as manager:
        yield manager


def worker(manager: GPUResourceManager, name: str) -> WorkerStatus:
    found = manager.status()["models"][name]["worker"]
    assert found is not None
    return found


@pytest.fixture
def model(isolated: GPUResourceManager, request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.node.name
    arguments: dict[str, Any] = getattr(request, "param", {})
    isolated.register(name, lambda: Engine(**arguments))
    yield name
    isolated.unregister(name)


def test_a_worker_is_in_the_status_from_its_load_to_its_release(isolated: GPUResourceManager, model: str) -> None:
    assert isolated.status()["isolation"] == "process"
    assert isolated.status()["models"][model]["worker"] is None
    with isolated.lease(model) as engine:
        assert engine.total() == 8 * MB
        seen = worker(isolated, model)
        assert psutil.Process(seen["pid"]).parent().ppid() == os.getpid()  # type: ignore[union-attr]
        assert (seen["device_bytes"], seen["context_bytes"]) == (108 * MB, 100 * MB)
        assert seen["host_bytes"] >= 8 * MB  # type: ignore[operator]
        assert (seen["checkpointed"], seen["last_offload"]) == (False, None)
    seen = worker(isolated, model)
    assert (seen["device_bytes"], seen["context_bytes"]) == (100 * MB, 100 * MB), "measured anew after a move"
    last = seen["last_offload"]
    assert last is not None
    assert (last["way"], last["bytes"], last["checkpoint_bytes"]) == ("weights", 8 * MB, 0)
    assert last["seconds"] > 0
    isolated.release(model)
    status = isolated.status()
    assert status["models"][model]["worker"] is None
    assert status["device"]["free_bytes"] == status["device"]["total_bytes"]


def test_ps_shows_which_process_is_the_worker_of_which_model(isolated: GPUResourceManager) -> None:
    isolated.register("asr", Engine)
    with isolated.lease("asr"):
        process = psutil.Process(worker(isolated, "asr")["pid"])
        server = process.parent()
        assert Path(f"/proc/{process.pid}/comm").read_text() == "gpu-worker:asr\n"
        assert server is not None
        assert server.name() == "gpu-fork-server"
    isolated.unregister("asr")


def test_a_checkpointed_worker_holds_nothing_on_the_device() -> None:
    device = SimulatedDevice(1 << 30, context_bytes=100 * MB)
    with GPUResourceManager(device, isolation="process", residue="checkpoint") as manager:
        manager.register("tts", Engine)
        with manager.lease("tts"):
            assert worker(manager, "tts")["context_bytes"] == 100 * MB
        manager.offload("tts")
        seen = worker(manager, "tts")
        assert (seen["checkpointed"], seen["device_bytes"], seen["context_bytes"]) == (True, 0, 0)
        last = seen["last_offload"]
        assert last is not None
        assert (last["way"], last["bytes"]) == ("weights+checkpoint", 8 * MB)
        assert last["checkpoint_bytes"] == 100 * MB
        status = manager.status()
        assert status["models"]["tts"]["outside_bytes"] == 0
        assert status["device"]["free_bytes"] == status["device"]["total_bytes"]
        with manager.lease("tts") as engine:
            assert engine.total() == 8 * MB
            seen = worker(manager, "tts")
            assert (seen["checkpointed"], seen["context_bytes"]) == (False, 100 * MB)


def test_a_measurement_counts_for_a_second(
    isolated: GPUResourceManager, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = isolated._overview._workers
    assert workers is not None
    measured = []
    measure = workers._measure
    monkeypatch.setattr(workers, "_measure", lambda pid: measured.append(pid) or measure(pid))
    clock = isolated._dispatcher.clock
    assert isinstance(clock, ManualClock)
    with isolated.lease(model):
        first = worker(isolated, model)
        worker(isolated, model)
        assert measured == [first["pid"]]
        clock.advance(1)
        worker(isolated, model)
        assert measured == [first["pid"]] * 2
        idle_since_s = isolated._managed_models[model].times.idle_since_s
    worker(isolated, model)
    assert len(measured) == 3, "a move changes what it holds"
    assert isolated._managed_models[model].times.idle_since_s == clock.now() != idle_since_s


@pytest.mark.parametrize("model", [{"extra_bytes": 400 * MB}], indirect=True)
def test_main_memory_of_a_worker_beyond_its_books_is_unmanaged_memory(isolated: GPUResourceManager, model: str) -> None:
    with isolated.lease(model):
        whole = isolated.status()
    status = whole["models"][model]
    found = status["outside_processes"]
    assert [each["pid"] for each in found] == [status["worker"]["pid"]]  # type: ignore[index]
    assert status["outside_bytes"] == found[0]["host_bytes"]
    assert 380 * MB < found[0]["host_bytes"] < 600 * MB  # type: ignore[operator]
    assert whole["host"]["outside_bytes"] == status["outside_bytes"]
    isolated.release(model)
    assert isolated.status()["models"][model]["outside_bytes"] == 0


@pytest.mark.parametrize("model", [{"child": True}], indirect=True)
def test_workers_and_their_children_are_no_children_of_the_manager(isolated: GPUResourceManager, model: str) -> None:
    with isolated.lease(model) as engine:
        child = engine.child_pid()
        tree = [each.pid for each in psutil.Process().children(recursive=True)]
        assert {child, worker(isolated, model)["pid"]} <= set(tree)
        children = sample(isolated.device).children
        assert children is not None
        assert {each.pid for each in children}.isdisjoint([child, worker(isolated, model)["pid"]])
        assert isolated.status()["models"][model]["outside_bytes"] == 0, "too little to be mentioned"


def test_what_a_load_has_brought_so_far_is_that_of_the_model(isolated: GPUResourceManager, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def load() -> Engine:
        engine = Engine()
        device.charge(8 * MB)
        gate.open().read()
        device.refund(8 * MB)
        return engine

    device = isolated.device._device  # type: ignore[attr-defined]
    isolated.register("arriving", load)
    isolated.warm("arriving")
    with gate.open("w"):  # it has come to the gate
        status = isolated.status()
        seen = status["models"]["arriving"]["worker"]
        assert seen is not None
        assert (seen["device_bytes"], seen["context_bytes"]) == (108 * MB, 100 * MB)
        assert views.on_the_card(status)["arriving"] == 8 * MB
    assert isolated.wait_for("arriving", State.DEVICE, 60)
    assert worker(isolated, "arriving")["pid"] == seen["pid"]
    assert worker(isolated, "arriving")["context_bytes"] == 100 * MB
    assert isolated._isolation is not None
    assert not isolated._isolation.loading
    isolated.unregister("arriving")


def test_a_worker_that_has_died_is_not_in_the_status(isolated: GPUResourceManager, model: str) -> None:
    with isolated.lease(model):
        os.kill(worker(isolated, model)["pid"], signal.SIGKILL)
        resident: Any = isolated._managed_models[model].resident
        assert wait_until(lambda: resident.worker.ended)
        assert isolated.status()["models"][model]["worker"] is None
        assert isolated.status()["device"]["free_bytes"] == 1 << 30


def test_without_isolation_there_is_no_worker(manager: GPUResourceManager, workshop: Workshop) -> None:
    with manager.lease("tts"):
        status = manager.status()
    assert status["isolation"] == "none"
    assert status["models"]["tts"]["worker"] is None
