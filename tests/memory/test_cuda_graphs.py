"""Graphs captured by compiled code are found, although no engine refers to them."""

from __future__ import annotations

import inspect
import sys
import threading
import types
from typing import Any

import pytest
import torch

from gpu_manager import SimulatedDevice
from residency.errors import CapturedGraphs
from residency.memory import EngineResident


class Constant:
    """The used attributes of a tensor on a card."""

    is_cuda = True

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class CUDAGraphNode:
    """The used attributes of torch's class."""

    def __init__(self, addresses: list[int | None], constants: tuple[Constant, ...] = ()) -> None:
        self.graph: Any = object()
        self.static_input_data_ptrs = addresses
        self.wrapped_function = types.SimpleNamespace(constants=constants)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """Returns a thread-local variable for graphs, as in torch."""
    module = types.ModuleType("torch._inductor.cudagraph_trees")
    module.CUDAGraphNode = CUDAGraphNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return threading.local()


@pytest.fixture
def engine() -> list[torch.Tensor]:
    return [torch.ones(1000), torch.ones(1000)]


def test_an_engine_whose_weights_are_in_a_graph_stays_on_the_device(
    captured: threading.local, engine: list[torch.Tensor], device: SimulatedDevice
) -> None:
    resident = EngineResident(engine, device)
    captured.trees = [CUDAGraphNode([None, engine[1].data_ptr() + 400])]
    with pytest.raises(CapturedGraphs, match=r"torch\.compile: \[1\]"):
        resident.offload()
    assert resident.device_bytes == 8000
    captured.trees[0].graph = None  # as torch does when it drops them
    resident.offload()
    assert resident.device_bytes == 0


def test_weights_that_were_compiled_in_as_constants_count_as_well(
    captured: threading.local, engine: list[torch.Tensor], device: SimulatedDevice
) -> None:
    captured.trees = [CUDAGraphNode([], (Constant(engine[0].data_ptr()),))]
    with pytest.raises(CapturedGraphs, match=r"torch\.compile: \[0\]"):
        EngineResident(engine, device).offload()


def test_graphs_of_another_engine_keep_nobody_on_the_device(
    captured: threading.local, engine: list[torch.Tensor], device: SimulatedDevice
) -> None:
    other = torch.ones(1000)
    captured.trees = [CUDAGraphNode([other.data_ptr()], (Constant(other.data_ptr()),)), CUDAGraphNode([None])]
    assert EngineResident(engine, device).offload() == 8000


def test_graphs_that_do_not_tell_what_they_remember_may_be_anybodys(
    captured: threading.local, engine: list[torch.Tensor], device: SimulatedDevice
) -> None:
    captured.trees = [CUDAGraphNode([])]
    del captured.trees[0].static_input_data_ptrs
    with pytest.raises(CapturedGraphs):
        EngineResident(engine, device).offload()


def test_torch_has_what_is_looked_at() -> None:
    trees = pytest.importorskip("torch._inductor.cudagraph_trees")
    code = inspect.getsource(trees.CUDAGraphNode)
    for name in ("self.static_input_data_ptrs", "self.graph", "self.wrapped_function"):
        assert f"{name}:" in code or f"{name} =" in code
    assert "constants" in inspect.getsource(trees.WrappedFunction)
