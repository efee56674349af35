"""Tensors that an engine creates at work are offloaded with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu_manager import DeviceOutOfMemory, GPUResourceManager, SimulatedDevice
from residency.errors import CapturedGraphs, OnAnotherDevice
from residency.memory import EngineResident, SnapshotFolder


class Engine:
    def __init__(self) -> None:
        self.module = torch.nn.Linear(10, 10)
        self.cache: dict[str, torch.Tensor] = {}


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_what_an_engine_makes_while_it_works_leaves_with_it(engine: Engine, device: SimulatedDevice) -> None:
    resident = EngineResident(engine, device)
    assert resident.device_bytes == 440
    for step in range(3):
        engine.cache[f"session {step}"] = torch.full((100,), float(step))
        resident.offload()
        assert device.ledger_bytes == 0
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in engine.cache.values())
        resident.restore()
        assert device.ledger_bytes == 440 + 400 * (step + 1)
        assert [tensor[0].item() for tensor in engine.cache.values()] == list(range(step + 1))


def test_tensors_that_are_made_anew_at_each_pass_do_not_pile_up(engine: Engine, device: SimulatedDevice) -> None:
    resident = EngineResident(engine, device)
    for step in range(5):
        engine.module.__dict__["weight_g"] = torch.full((50,), float(step))  # like weight_norm
        resident.offload()
        resident.restore()
        assert device.ledger_bytes == 640
        assert engine.module.__dict__["weight_g"].sum() == 50 * step
    del engine.module.__dict__["weight_g"]
    resident.offload()
    resident.restore()
    assert device.ledger_bytes == 440


def test_a_view_of_a_weight_is_no_newcomer(engine: Engine, device: SimulatedDevice) -> None:
    resident = EngineResident(engine, device)
    engine.cache["row"] = engine.module.weight.detach()[0]
    before = engine.cache["row"].clone()
    resident.offload()
    resident.restore()
    assert device.ledger_bytes == 440
    assert torch.equal(engine.cache["row"], before)


def test_a_weight_that_is_given_other_bytes_between_two_walks_is_noticed(
    engine: Engine, device: SimulatedDevice
) -> None:
    resident = EngineResident(engine, device)
    for value in (1.0, 2.0):
        resident.offload()
        resident.restore()
        engine.module.weight.data = torch.full((10, 10), value)  # same tensor, new storage
    resident.offload()
    assert device.ledger_bytes == engine.module.weight.untyped_storage().nbytes() == 0
    resident.restore()
    assert engine.module.weight.sum() == 200
    engine.cache["tied"] = torch.zeros(40)
    resident.offload()
    resident.restore()
    engine.cache["tied"].data = engine.module.weight.data.view(-1)
    _ = engine.module.weight.detach().numpy()  # needs a new storage, as does its new tie
    resident.offload()
    resident.restore()
    assert device.ledger_bytes == 440
    assert engine.cache["tied"].untyped_storage()._cdata == engine.module.weight.untyped_storage()._cdata


def test_newcomers_that_the_books_have_no_room_for_do_not_stop_the_offload(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    device = SimulatedDevice(capacity_bytes=500)
    resident = EngineResident(engine, device)
    engine.cache["large"] = torch.ones(100)
    resident.offload()
    assert device.ledger_bytes == 0
    assert "stay on the device" in caplog.text
    assert engine.cache["large"].sum() == 100


def test_newcomers_on_another_gpu_do_not_stop_the_offload(
    engine: Engine, device: SimulatedDevice, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = EngineResident(engine, device)
    late = engine.cache["elsewhere"] = torch.ones(100)

    def holds_tensor(tensor: torch.Tensor) -> bool:
        if tensor is late:
            raise OnAnotherDevice("cuda:1", "cuda:0")
        return True

    monkeypatch.setattr(device, "holds_tensor", holds_tensor)
    resident.offload()
    assert device.ledger_bytes == 0
    assert "cuda:1" in caplog.text
    with pytest.raises(OnAnotherDevice):
        EngineResident(late, device)
    assert device.ledger_bytes == 0


def test_what_is_skipped_stays_where_it_is(engine: Engine, device: SimulatedDevice) -> None:
    engine.cache["mine"] = torch.ones(100)
    resident = EngineResident(engine, device, skip=[".cache"])
    resident.offload()
    assert engine.cache["mine"].sum() == 100
    assert engine.module.weight.untyped_storage().nbytes() == 0


def test_an_engine_that_is_too_large_leaves_no_trace_in_the_books(engine: Engine) -> None:
    device = SimulatedDevice(capacity_bytes=100)
    with pytest.raises(DeviceOutOfMemory):
        EngineResident(engine, device)
    assert device.ledger_bytes == 0


def test_newcomers_are_part_of_the_snapshot(engine: Engine, device: SimulatedDevice, tmp_path: Path) -> None:
    resident = EngineResident(engine, device)
    engine.cache["made"] = torch.arange(100.0)
    store = SnapshotFolder(tmp_path)
    resident.save(store, "tts")
    assert (resident.device_bytes, resident.host_bytes, device.ledger_bytes) == (0, 0, 0)
    resident.load(store, "tts")
    resident.restore()
    assert torch.equal(engine.cache["made"], torch.arange(100.0))


def test_a_new_view_stays_tied_when_its_weight_needs_a_new_home(engine: Engine, device: SimulatedDevice) -> None:
    resident = EngineResident(engine, device)
    _ = engine.module.weight.detach().numpy()  # from now on torch refuses to resize this storage
    engine.cache["row"] = engine.module.weight.detach()[2]
    resident.offload()
    resident.restore()
    engine.module.weight.data[2, 0] = 7.0
    assert engine.cache["row"][0] == 7.0
    assert device.ledger_bytes == 440


def test_snapshots_of_what_is_made_in_passing_do_not_pile_up(
    engine: Engine, device: SimulatedDevice, tmp_path: Path
) -> None:
    resident, store = EngineResident(engine, device), SnapshotFolder(tmp_path)
    for turn in range(4):
        engine.cache["session"] = torch.rand(1000)
        expected = engine.cache["session"].tolist()
        resident.save(store, "tts")
        assert len(list(tmp_path.glob("*.safetensors"))) == 2, f"turn {turn}: the weights, and what was made since"
        resident.load(store, "tts")
        assert len(list(tmp_path.glob("*.safetensors"))) == 1, "the weights are written once"
        resident.restore()
        assert engine.cache["session"].tolist() == expected


def captured_graph() -> torch.cuda.CUDAGraph:
    """Returns a graph without a capture, which would need CUDA."""
    return torch.cuda.CUDAGraph() if torch.cuda.is_available() else object.__new__(torch.cuda.CUDAGraph)


def test_an_engine_with_captured_graphs_stays_where_they_expect_it(
    engine: Engine, device: SimulatedDevice, tmp_path: Path
) -> None:
    engine.graphs = {24: captured_graph()}
    resident = EngineResident(engine, device)
    for leave in (resident.offload, lambda: resident.save(SnapshotFolder(tmp_path), "tts")):
        with pytest.raises(CapturedGraphs, match=r"\.graphs\[24\].*enable_cuda_graph=False"):
            leave()
        assert resident.device_bytes == device.ledger_bytes == 440
        assert engine.module(torch.ones(10)).isfinite().all()
    engine.graphs.clear()
    assert resident.offload() == 440


def test_a_graph_captured_during_a_request_is_noticed(engine: Engine, device: SimulatedDevice) -> None:
    resident = EngineResident(engine, device)
    resident.offload()
    resident.restore()
    engine.module.graph = captured_graph()
    with pytest.raises(CapturedGraphs):
        resident.offload()
    resident.release()
    assert device.ledger_bytes == 0


@pytest.mark.in_process("imitates CUDA graphs in this process")
def test_under_the_manager_it_stays_until_its_release_and_says_why(engine: Engine, device: SimulatedDevice) -> None:
    engine.graph = captured_graph()
    with GPUResourceManager(device) as manager:
        manager.register("tts", lambda: engine)
        with manager.lease("tts"):
            pass
        status = manager.status()["models"]["tts"]
        assert status["state"] == "gpu"
        assert "CUDA graph" in status["last_error"]
        with manager.lease("tts") as again:
            assert again is engine
        with pytest.raises(CapturedGraphs):
            manager.offload("tts")
        assert manager.release("tts") is True
        assert device.ledger_bytes == 0
