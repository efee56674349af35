"""Weights that outlive their worker process, for loaders that take them."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from worker_engines import LINUX, Gate, await_threads, held, started

from gpu_manager import GPUResourceManager, SimulatedDevice, State, kept_weights
from residency.contracts import Memory
from residency.errors import DeviceOutOfMemory, WorkerDied
from residency.memory.mirror import MirrorSpan
from residency.memory.weights_mirror import SpanCopier
from residency.shared_file import SharedFile
from residency.workers import isolation
from residency.workers.resident import WorkerResident

pytestmark = LINUX

MB = 1 << 20
FREE = Memory(free_bytes=1 << 40)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Linear(700, 500)
        self.head = torch.nn.Linear(700, 500)
        self.head.weight = self.layers.weight
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("zeros", torch.zeros(1 << 19))
        self.register_buffer("nothing", torch.empty(0, 4))
        self.register_buffer("codes", torch.arange(5, dtype=torch.int8))
        self.register_buffer("turned", torch.rand(30, 40).to(torch.bfloat16).t())


class Engine:
    def __init__(self, model: Model, source: str) -> None:
        self.model, self.source = model, source

    def weights(self) -> dict[str, torch.Tensor]:
        return dict(self.model.state_dict())


def load(file: str, gate: Gate | None = None) -> Engine:
    """Reads the file only without kept weights."""
    model, kept = Model(), kept_weights("model")
    model.load_state_dict(torch.load(file) if kept is None else kept, assign=True)
    if gate is not None:
        stop_in_copies(gate)
    return Engine(model, "file" if kept is None else "kept")


def stop_in_copies(gate: Gate) -> None:
    """Stops this process at the gate, in the middle of a copy to main memory."""
    whole = SpanCopier.to_host

    def half(copier: SpanCopier, span: MirrorSpan, target: torch.Tensor, put_together: bool) -> None:
        target[: len(target) // 2].fill_(7)
        gate()
        whole(copier, span, target, put_together)

    SpanCopier.to_host = half  # type: ignore[method-assign]


def fails_with_kept(file: str) -> Engine:
    engine = load(file)
    if engine.source == "kept":
        raise ValueError("no such weights")
    return engine


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = str(tmp_path / "weights.pt")
    torch.save(Model().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def shared() -> Iterator[GPUResourceManager]:
    with GPUResourceManager(SimulatedDevice(1 << 30), isolation="process") as manager:
        yield manager


@pytest.fixture
def manager(shared: GPUResourceManager, monkeypatch: pytest.MonkeyPatch) -> Iterator[GPUResourceManager]:
    """Afterwards, no kept memory is left."""
    monkeypatch.setattr(isolation, "host_memory", lambda: FREE)
    yield shared
    for name in shared.names():
        shared.unregister(name)
    assert not kept_files()


def kept_files() -> list[str]:
    names = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return [name for name in names if os.path.lexists(name) and "gpu-worker-weights" in os.readlink(name)]


def model(manager: GPUResourceManager, name: str = "tts") -> Any:
    return manager.status()["models"][name]


def resident(manager: GPUResourceManager) -> WorkerResident:
    found = manager._managed_models["tts"].resident
    assert isinstance(found, WorkerResident)
    return found


def ask(manager: GPUResourceManager, name: str = "tts") -> tuple[str, dict[str, torch.Tensor]]:
    """Returns the source of the engine's weights, and these."""
    with manager.lease(name) as engine:
        return engine.source, engine.weights()


def kill(manager: GPUResourceManager, name: str = "tts") -> None:
    """Kills the worker, and waits until the manager has noticed it."""
    process = psutil.Process(model(manager, name)["worker"]["pid"])
    process.send_signal(signal.SIGKILL)
    psutil.wait_procs([process])
    await_threads(known=[thread for thread in threading.enumerate() if "server" in thread.name])


def killed_while_offloaded(manager: GPUResourceManager, load: Callable[[], Engine]) -> dict[str, torch.Tensor]:
    manager.register("tts", load)
    source, weights = ask(manager)
    assert source == "file"
    manager.offload("tts")
    kill(manager)
    return weights


def test_a_model_whose_offloaded_worker_was_killed_comes_back_without_its_file(
    manager: GPUResourceManager, file: str
) -> None:
    before = killed_while_offloaded(manager, functools.partial(load, file))
    Path(file).unlink()
    status = model(manager)
    assert (status["state"], status["worker"]) == ("cpu", None)
    assert status["host_bytes"] >= status["kept_bytes"] > 700 * 500 * 4
    for _ in range(2):
        source, after = ask(manager)
        assert source == "kept"
        assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert after["turned"].stride() == before["turned"].stride()
        manager.offload("tts")
        kill(manager)


def test_ties_stay_ties(manager: GPUResourceManager, file: str) -> None:
    killed_while_offloaded(manager, functools.partial(load, file))
    with manager.lease("tts") as engine:
        pointers = {engine.model.layers.weight.data_ptr(), engine.model.head.weight.data_ptr()}
    assert len(pointers) == 1


def test_no_request_fails_if_the_worker_dies_between_requests(manager: GPUResourceManager, file: str) -> None:
    manager.register("tts", functools.partial(load, file))
    for _ in range(3):
        ask(manager)
        manager.offload("tts")
        os.kill(model(manager)["worker"]["pid"], signal.SIGKILL)
    assert ask(manager)[0] == "kept"


def test_an_interrupted_offload_keeps_nothing(manager: GPUResourceManager, file: str, gate: Gate) -> None:
    manager.register("tts", functools.partial(load, file, gate), keep_warm=-1)
    ask(manager)
    assert model(manager)["kept_bytes"] == 0
    offload = started(manager.offload, "tts")
    os.kill(gate.reached(), signal.SIGKILL)
    with pytest.raises(WorkerDied):
        offload.result(60)
    assert not kept_files()
    assert ask(manager)[0] == "file"


def test_a_worker_that_dies_with_its_model_on_the_device_leaves_nothing(manager: GPUResourceManager, file: str) -> None:
    manager.register("tts", functools.partial(load, file), keep_warm=-1)
    ask(manager)
    manager.offload("tts")
    ask(manager)
    assert model(manager)["kept_bytes"] == 0
    kill(manager)
    assert manager.wait_for("tts", State.RELEASED, 60)
    assert not kept_files()
    assert ask(manager)[0] == "file"


@pytest.mark.parametrize("way", ["by hand", "idle", "unregistered"])
def test_a_release_frees_kept_weights(manager: GPUResourceManager, file: str, way: str) -> None:
    killed_while_offloaded(manager, functools.partial(load, file))
    assert kept_files()
    if way == "by hand":
        assert manager.release("tts")
    elif way == "idle":
        manager.configure("tts", idle_timeout=0)
        assert manager.wait_for("tts", State.RELEASED, 60)
    else:
        manager.unregister("tts")
    assert not kept_files()
    if way != "unregistered":
        assert model(manager)["host_bytes"] == 0
        assert ask(manager)[0] == "file"


def test_a_release_of_a_living_worker_frees_them_too(manager: GPUResourceManager, file: str) -> None:
    manager.register("tts", functools.partial(load, file))
    ask(manager)
    manager.offload("tts")
    assert kept_files()
    manager.release("tts")
    assert not kept_files()
    assert ask(manager)[0] == "file"


def test_a_closed_manager_has_none(file: str) -> None:
    with GPUResourceManager(SimulatedDevice(1 << 30), isolation="process") as manager:
        killed_while_offloaded(manager, functools.partial(load, file))
        assert kept_files()
    assert not kept_files()


def test_full_main_memory_keeps_nothing(
    manager: GPUResourceManager, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "host_memory", lambda: Memory(free_bytes=MB))
    killed_while_offloaded(manager, functools.partial(load, file))
    assert manager.wait_for("tts", State.RELEASED, 60)
    assert not kept_files()
    assert ask(manager)[0] == "file"


def test_the_limit_of_main_memory_holds_for_all_kept_weights_together(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "host_memory", lambda: FREE)
    with GPUResourceManager(SimulatedDevice(1 << 30, 2 * MB), isolation="process") as manager:
        for name in ("first", "second"):
            manager.register(name, functools.partial(load, file))
            ask(manager, name)
            manager.offload(name)
            kill(manager, name)
        assert manager.wait_for("second", State.RELEASED, 60)
        assert len(kept_files()) == 1
        assert (ask(manager, "first")[0], ask(manager, "second")[0]) == ("kept", "file")


def test_damaged_weights_are_not_used(manager: GPUResourceManager, file: str, caplog: pytest.LogCaptureFixture) -> None:
    killed_while_offloaded(manager, functools.partial(load, file))
    kept = resident(manager)._kept
    assert kept is not None
    os.pwrite(kept.file.fd, b"x", 1000)
    with caplog.at_level("WARNING"):
        assert ask(manager)[0] == "file"
    assert "they are damaged at byte 0" in caplog.text


def test_a_loader_that_fails_with_kept_weights_gets_none_the_next_time(manager: GPUResourceManager, file: str) -> None:
    killed_while_offloaded(manager, functools.partial(fails_with_kept, file))
    with pytest.raises(ValueError, match="no such weights"):
        ask(manager)
    assert not kept_files()
    assert ask(manager)[0] == "file"


def test_a_full_card_keeps_the_weights_for_another_try(manager: GPUResourceManager, file: str) -> None:
    killed_while_offloaded(manager, functools.partial(load, file))
    card = manager.device._device  # type: ignore[attr-defined]
    card.report_outside(os.getpid(), 1 << 30)
    with pytest.raises(DeviceOutOfMemory):
        ask(manager)
    card.report_outside(os.getpid(), 0)
    assert ask(manager)[0] == "kept"


def test_a_full_card_ends_the_workers_whose_weights_outlive_them(file: str) -> None:
    card = SimulatedDevice(130 * MB, context_bytes=100 * MB)
    with GPUResourceManager(card, isolation="process", residue="keep") as manager:
        for name in ("first", "second"):
            manager.register(name, functools.partial(load, file))
        ask(manager, "first")
        manager.offload("first")
        assert ask(manager, "second")[0] == "file"
        manager.offload("second")
        status = model(manager, "first")
        assert (status["state"], status["worker"]) == ("cpu", None)
        assert ask(manager, "first")[0] == "kept"
        assert ask(manager, "second")[0] == "kept"


def test_loaders_that_do_not_ask_share_nothing(manager: GPUResourceManager) -> None:
    manager.register("tts", functools.partial(Engine, Model(), "none"))
    ask(manager)
    manager.offload("tts")
    assert model(manager)["kept_bytes"] is None
    assert not kept_files()
    kill(manager)
    assert manager.wait_for("tts", State.RELEASED, 60)


def test_fifty_deaths_leave_nothing(manager: GPUResourceManager, file: str) -> None:
    manager.register("tts", functools.partial(load, file))
    counts = []
    for _ in range(51):
        ask(manager)
        manager.offload("tts")
        kill(manager)
        counts.append({name: len(found) for name, found in held().items()})
    assert all(count <= counts[0][name] for name, count in counts[-1].items()), (counts[0], counts[-1])


def test_a_forked_child_holds_no_kept_weights() -> None:
    file = SharedFile.create(4096)
    pid = os.fork()
    if pid == 0:
        os._exit(file.fd != -1)
    assert os.waitpid(pid, 0)[1] == 0
    assert file.fd >= 0
    file.close()
