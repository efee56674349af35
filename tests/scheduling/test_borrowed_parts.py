"""A part that a loader is given and does not build: off the device from the start, and its owner's again at the end."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from fakes import Gate, Worker, running

from gpu_manager import GPUResourceManager, LoadTimeout, ModelExists, SimulatedDevice
from residency.clock import ManualClock
from residency.errors import SharedWeights

pytestmark = pytest.mark.usefixtures("unmeasured")

MODEL = Path(str(importlib.util.find_spec("hibari").origin)).parent / "assets" / "oov.onnx"
WEIGHTS_BYTES = 100 * 100 * 4
KEPT_BYTES = WEIGHTS_BYTES + MODEL.stat().st_size


class Tokenizer:
    """Ready, as a program makes it: weights and a session."""

    def __init__(self) -> None:
        self.weight = torch.arange(100 * 100, dtype=torch.float32)
        self.session = onnxruntime.InferenceSession(str(MODEL), providers=["CPUExecutionProvider"])
        self.expected = self.codes()

    def codes(self) -> list[float]:
        assert self.weight.untyped_storage().nbytes() == WEIGHTS_BYTES
        heard = self.session.run(None, {"chars": np.array([[1, 2, 3]], np.int64)})[0]
        return [*self.weight[-3:].tolist(), *heard.ravel()[:3].tolist()]

    @property
    def is_away(self) -> bool:
        return self.session._sess is None and not self.weight.untyped_storage().nbytes()


class Engine:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.voice = tokenizer, torch.ones(10)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture
def managed(device: SimulatedDevice, tokenizer: Tokenizer) -> GPUResourceManager:
    manager = GPUResourceManager(device, keep_warm=60)
    manager.register("tts", lambda: Engine(tokenizer), keep=tokenizer)
    return manager


def tts(manager: GPUResourceManager) -> dict[str, Any]:
    return manager.status()["models"]["tts"]


@pytest.mark.in_process("a kept part is an object of this process")
def test_it_leaves_the_device_before_the_first_load_and_the_status_says_where_it_is(
    managed: GPUResourceManager, device: SimulatedDevice, tokenizer: Tokenizer
) -> None:
    for turn in range(2):
        assert tokenizer.is_away
        assert device.ledger_bytes == 0
        status = tts(managed)
        assert (status["state"], status["device_bytes"], status["host_bytes"]) == ("released", 0, WEIGHTS_BYTES), turn
        with managed.lease("tts") as engine:
            assert engine.tokenizer.codes() == tokenizer.expected
            assert device.ledger_bytes == KEPT_BYTES + 40
        managed.release("tts")
    managed.close()


@pytest.mark.parametrize("last", ["registered", "used", "offloaded", "released"])
@pytest.mark.parametrize("end", ["unregister", "close"])
@pytest.mark.in_process("a kept part is an object of this process")
def test_it_is_its_owners_again_at_the_end(
    managed: GPUResourceManager, device: SimulatedDevice, tokenizer: Tokenizer, last: str, end: str
) -> None:
    if last != "registered":
        with managed.lease("tts"):
            pass
        {"used": lambda name: None, "offloaded": managed.offload, "released": managed.release}[last]("tts")
    managed.unregister("tts") if end == "unregister" else managed.close()
    assert device.ledger_bytes == 0
    assert tokenizer.codes() == tokenizer.expected
    managed.close()
    assert tokenizer.codes() == tokenizer.expected
    with GPUResourceManager(device) as another:
        another.register("tts", lambda: Engine(tokenizer), keep=tokenizer)
        assert tokenizer.is_away
    assert tokenizer.codes() == tokenizer.expected


@pytest.mark.in_process("a kept part is an object of this process")
def test_idle_models_make_room_for_its_way_back(tokenizer: Tokenizer) -> None:
    device = SimulatedDevice(KEPT_BYTES + 100)
    with GPUResourceManager(device) as manager:
        manager.register("tts", lambda: Engine(tokenizer), keep=tokenizer)
        manager.register("other", lambda: torch.ones(1000), keep_warm=60)
        with manager.lease("other"):
            pass
        manager.unregister("tts")
        assert tokenizer.codes() == tokenizer.expected
        assert manager.status()["models"]["other"]["state"] == "cpu"


@pytest.mark.in_process("a kept part is an object of this process")
def test_what_finds_no_room_on_its_way_back_is_told(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    device = SimulatedDevice(KEPT_BYTES + 100)
    with GPUResourceManager(device) as manager:
        manager.register("tts", lambda: Engine(tokenizer), keep=tokenizer)
        manager.register("other", lambda: torch.ones(1000))
        with manager.lease("other"):
            manager.unregister("tts")
    assert "create a new one" in caplog.text
    assert device.ledger_bytes == 0


@pytest.mark.in_process("a kept part is an object of this process")
def test_a_registration_that_is_refused_leaves_it_where_it_was(
    managed: GPUResourceManager, device: SimulatedDevice, tokenizer: Tokenizer
) -> None:
    mine = Tokenizer()
    with pytest.raises(ModelExists):
        managed.register("tts", lambda: Engine(mine), keep=mine)
    with pytest.raises(SharedWeights):
        managed.register("other", lambda: Engine(tokenizer), keep=tokenizer)
    assert managed.names() == ("tts",)
    assert mine.codes() == mine.expected
    managed.close()
    assert tokenizer.codes() == tokenizer.expected


@pytest.mark.in_process("a kept part is an object of this process")
def test_one_that_cannot_leave_is_refused_at_once(device: SimulatedDevice, tmp_path: Path) -> None:
    mine = Tokenizer()
    mine.session._model_path = str(tmp_path / "gone.onnx")
    with GPUResourceManager(device) as manager:
        with pytest.raises(FileNotFoundError):
            manager.register("tts", lambda: Engine(mine), keep=mine)
        assert manager.names() == ()
    assert mine.codes() == mine.expected
    assert device.ledger_bytes == 0


@pytest.mark.in_process("a kept part is an object of this process")
def test_a_load_that_was_given_up_does_not_take_it_from_its_owner(tokenizer: Tokenizer) -> None:
    clock, device, gate = ManualClock(), SimulatedDevice(1 << 30), Gate()

    def load() -> Engine:
        gate.pass_through()
        return Engine(tokenizer)

    manager = GPUResourceManager(device, clock=clock)
    manager.register("tts", load, keep=tokenizer, load_timeout=60)
    request = Worker(lambda: manager.lease("tts").__enter__())
    gate.wait_for_arrival()
    hung = running("gpu-loading-tts")
    clock.advance(60)
    with pytest.raises(LoadTimeout):
        request.result()
    manager.close()
    gate.open()
    for thread in hung:
        thread.join(60)
    assert tokenizer.codes() == tokenizer.expected
    assert device.ledger_bytes == 0


def test_a_loader_draws_the_same_however_often_and_for_whomever_it_builds(device: SimulatedDevice) -> None:
    def load() -> list[torch.Tensor]:
        return [torch.randn(100), torch.from_numpy(np.random.rand(100))]

    torch.manual_seed(3)
    np.random.seed(3)
    expected = load()
    torch.manual_seed(3)
    np.random.seed(3)
    with GPUResourceManager(device) as manager:
        manager.register("tts", load)
        for seed in range(3):
            torch.manual_seed(seed)
            drawn = torch.randn(1)
            torch.manual_seed(seed)
            with manager.lease("tts") as engine:
                assert all(map(torch.equal, engine, expected))
            assert torch.equal(torch.randn(1), drawn), "and leaves the request's numbers alone"
            manager.release("tts")
