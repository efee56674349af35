"""The index of a mirror in shared memory, and the tensors that a loader takes from it."""

from __future__ import annotations

import functools

import pytest
import torch

from gpu_manager import SimulatedDevice
from residency.memory import Weights, mirror, weights_mirror
from residency.memory.kept import index_of, kept_weights, named_tensors, offered
from residency.workers.spawner import can_fork_workers

pytestmark = pytest.mark.skipif(not can_fork_workers(), reason="needs shared memory files")


class Parts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(100, 70), torch.nn.Linear(5, 3, dtype=torch.float16)
        self.register_buffer("odd", torch.arange(13, dtype=torch.int8))
        self.register_buffer("every", torch.rand(40, 40)[::2, 3:])


class Extra(torch.nn.Linear):
    def get_extra_state(self) -> int:
        return 1


def offloaded(engine: Parts, shared: bool = True) -> Weights:
    weights = Weights(dict(engine.state_dict(keep_vars=True).items()), SimulatedDevice(1 << 30))
    weights.mirror.shared = shared
    weights.offload()
    return weights


@pytest.mark.parametrize("group_bytes", [256, 5000, mirror.GROUP_BYTES])
@pytest.mark.parametrize("span_bytes", [64, 1000, mirror.SPAN_BYTES])
def test_all_layouts_give_the_same_tensors(monkeypatch: pytest.MonkeyPatch, span_bytes: int, group_bytes: int) -> None:
    lay_out = functools.partial(mirror.lay_out, span_bytes=span_bytes, group_bytes=group_bytes)
    monkeypatch.setattr(weights_mirror, "lay_out", lay_out)
    engine = Parts()
    before = {name: tensor.clone() for name, tensor in engine.state_dict().items()}
    named = named_tensors(engine, ["", "second"])
    kept = index_of(offloaded(engine), named)
    assert kept is not None
    with offered(kept) as parts:
        whole, second, other = kept_weights(""), kept_weights("second"), kept_weights("third")
    assert parts == ["", "second", "third"]
    assert other is None
    assert whole is not None
    assert second is not None
    assert whole.keys() == before.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in before.items())
    assert torch.equal(second["weight"], before["second.weight"])
    whole["odd"].zero_()  # of the loader alone
    with offered(kept):
        again = kept_weights("")
    assert again is not None
    assert torch.equal(again["odd"], before["odd"])


def test_without_an_offer_there_are_none() -> None:
    assert kept_weights("model") is None
    with offered(None) as parts:
        assert kept_weights("model") is None
    assert parts == ["model"]


def test_a_part_with_a_tensor_that_does_not_move_is_read_from_its_file() -> None:
    engine = Parts()
    named = named_tensors(engine, ["first", "second"])
    named["first"]["made"] = torch.ones(3)
    kept = index_of(offloaded(engine), named)
    assert kept is not None
    assert list(kept.tensors) == ["second"]


def test_a_mirror_in_ordinary_memory_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Parts()
    named = named_tensors(engine, ["first"])
    assert index_of(offloaded(engine, shared=False), named) is None

    def full(nbytes: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(mirror.SharedFile, "create", full)
    engine = Parts()
    named = named_tensors(engine, ["first"])
    assert index_of(offloaded(engine), named) is None


def test_a_part_without_tensors_alone_is_refused() -> None:
    engine = Parts()
    engine.first = Extra(2, 2)
    with pytest.raises(TypeError, match=r"first\._extra_state is no tensor"):
        named_tensors(engine, ["first"])
    with pytest.raises(AttributeError):
        named_tensors(engine, ["third"])


def test_a_changed_span_gets_a_new_checksum() -> None:
    engine = Parts()
    named = named_tensors(engine, ["first"])
    weights = offloaded(engine)
    assert index_of(weights, named) is not None
    weights.restore()
    with torch.no_grad():
        engine.first.weight.fill_(2)
    weights.offload()
    with offered(index_of(weights, named)):
        taken = kept_weights("first")
    assert taken is not None
    assert torch.equal(taken["weight"], torch.full((70, 100), 2.0))
