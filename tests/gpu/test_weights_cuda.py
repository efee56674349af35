"""Streams, pinned pages, the allocator's pool, real shortage of memory: what only CUDA can show of moving weights."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_strategies import DTYPES
from gpu_memory import MB, Leave, Make, all_equal, random_bytes

from gpu_manager import CudaDevice, DeviceOutOfMemory, GPUResourceManager
from residency.memory import EngineResident, OnnxSessions, SnapshotFolder
from residency.memory.checksum import multilinear
from residency.memory.kept import index_of, kept_weights, named_tensors, offered
from residency.memory.mirror import HostMirror, MirrorSpan
from residency.memory.weights import Weights

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device that torch can use through CUDA")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_returns_bit_for_bit(device: CudaDevice, make: Make, dtype: torch.dtype) -> None:
    raw = random_bytes(16 * 1001)
    if dtype is torch.bool:
        raw &= 1
    tensor = raw.view(dtype)
    window, strided, transposed = tensor[3:9], tensor[::3], tensor[:1000].view(10, 100).t()
    before = raw.cpu()
    weights = make({"t": tensor, "w": window, "s": strided, "tt": transposed})
    weights.offload()
    assert tensor.untyped_storage().nbytes() == 0
    weights.restore()
    assert torch.equal(raw.cpu(), before)
    assert len({one.untyped_storage()._cdata for one in (tensor, window, strided, transposed)}) == 1
    assert (tensor.dtype, tensor.device.type, transposed.stride()) == (dtype, "cuda", (1, 100))


def test_small_odd_and_large_tensors_return_bit_for_bit_after_edits(make: Make) -> None:
    weights, tensors, copies = make.of_sizes(*range(1, 300), 9 * MB + 3, 40 * MB)
    for place in (0, 5 * MB, 9 * MB + 2):
        weights.offload()
        weights.restore()
        assert all_equal(tensors, copies)
        for name in ("299", "300", "150"):
            at = place % len(tensors[name])
            tensors[name].data[at] ^= 128
            copies[int(name)][at] ^= 128


def test_the_last_bytes_of_odd_sizes_are_watched(make: Make) -> None:
    weights, tensors, copies = make.of_sizes(*[2 * MB + 3] * 8)
    for bit in range(24):
        weights.offload()
        weights.restore()
        assert all_equal(tensors, copies)
        for name, copy in zip(tensors, copies, strict=True):
            tensors[name][2 * MB + bit // 8] ^= 1 << bit % 8
            copy[2 * MB + bit // 8] ^= 1 << bit % 8


def test_fingerprints_are_those_of_the_cpu(device: CudaDevice) -> None:
    raws = [random_bytes(size) for size in (1, 2, 3, 4, 5, 1000, 4 * MB + 1, 8 * MB)]
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    on_cpu = multilinear([raw.cpu() for raw in raws], len(raws), cpu)
    assert multilinear(raws, len(raws), cuda) == on_cpu


def test_a_restore_is_complete_before_it_returns(
    device: CudaDevice, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the stream of the copies is a second behind: the caller's stream reads right after."""
    weights, tensors, copies = make.of_sizes(64 * MB, 1000, 1001)
    weights.offload()
    assert weights.mirror.pinning is not None
    weights.mirror.pinning.join()
    transfer = device.transfer

    @contextmanager
    def late_transfer() -> Iterator[Any]:
        with transfer() as pool:
            torch.cuda._sleep(1_000_000_000)  # cycles, on the stream of the copies
            yield pool

    monkeypatch.setattr(device, "transfer", late_transfer)
    weights.restore()
    sums = [tensor.to(torch.int64).sum() for tensor in tensors.values()]
    assert [int(one) for one in sums] == [int(copy.to(torch.int64).sum()) for copy in copies]
    assert all_equal(tensors, copies)


def test_work_under_way_is_over_before_weights_are_compared_and_dropped(make: Make) -> None:
    """Work of another stream than the one that moves them: a copy into them that is far behind."""
    weights, tensors, _ = make.of_sizes(64 * MB)
    weights.offload()
    weights.restore()
    late = torch.randint(0, 256, (64 * MB,), dtype=torch.uint8).pin_memory()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(500_000_000)
        tensors["0"].copy_(late, non_blocking=True)
    weights.offload()
    weights.restore()
    assert torch.equal(tensors["0"].cpu(), late)


def test_work_under_way_is_over_before_weights_are_released(
    device: CudaDevice, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their memory is another thread's as soon as it is free."""
    monkeypatch.setattr(device, "settle", lambda: None)
    weights, tensors, copies = make.of_sizes(64 * MB)
    copy = torch.empty(64 * MB, dtype=torch.uint8).pin_memory()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        copy.copy_(tensors["0"], non_blocking=True)
    weights.release()
    others = torch.zeros(64 * MB, dtype=torch.uint8, device="cuda")
    stream.synchronize()
    assert torch.equal(copy, copies[0])
    assert not int(others.sum())


def test_pages_are_really_pinned_in_the_background_and_unpinned_at_the_end(device: CudaDevice, make: Make) -> None:
    weights, tensors, copies = make.of_sizes(300 * MB, 1000)
    weights.offload()
    assert weights.mirror.pinning is not None
    weights.mirror.pinning.join()
    mirror = weights.mirror._mirror
    assert mirror is not None
    assert mirror.pinned_bytes == weights.host_bytes
    groups = mirror.groups()
    assert len(groups) > 1
    assert all(group.is_pinned() and group[-1:].is_pinned() for group in groups)
    weights.restore()
    assert all_equal(tensors, copies)
    weights.release()
    assert not any(group.is_pinned() for group in groups)
    torch.zeros(1, device="cuda").add_(1).item()  # no error of CUDA is left behind


def test_pages_of_weights_that_are_only_forgotten_are_unpinned(device: CudaDevice) -> None:
    weights = Weights({"t": random_bytes(4 * MB)}, device)
    weights.offload()
    assert weights.mirror.pinning is not None
    assert weights.mirror._mirror is not None
    weights.mirror.pinning.join()
    groups = weights.mirror._mirror.groups()
    assert groups[0].is_pinned()
    del weights
    gc.collect()
    assert not groups[0].is_pinned()


def test_pages_are_unpinned_when_a_process_ends_that_closed_nothing() -> None:
    script = """
import atexit
atexit.register(lambda: print([group.is_pinned() for group in mirror.groups()]))  # comes last
from gpu_manager import CudaDevice
from residency.memory.mirror import lay_out
from residency.memory.mirror import HostMirror
mirror, device = HostMirror(lay_out([10_000])), CudaDevice.find()
assert all(mirror.pin(group, device) and group.is_pinned() for group in mirror.groups())
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout == "[False]\n"
    assert "Traceback" not in ended.stderr


def test_beyond_the_limit_memory_stays_pageable_and_moves_all_the_same() -> None:
    device = CudaDevice.find(pinned_limit_bytes=1000)
    assert device is not None
    tensor = random_bytes(4 * MB)
    before, weights = tensor.cpu(), Weights({"t": tensor}, device)
    weights.offload()
    assert weights.mirror.pinning is not None
    weights.mirror.pinning.join()
    assert weights.mirror._mirror is not None
    assert not weights.mirror._mirror.raw.is_pinned()
    weights.restore()
    assert torch.equal(tensor.cpu(), before)
    weights.release()


def test_an_offload_of_what_did_not_change_copies_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, tensors, _ = make.of_sizes(64 * MB, 1000)
    weights.offload()
    weights.restore()
    copied: list[int] = []
    span_of = HostMirror.span

    def span(mirror: HostMirror, span: MirrorSpan) -> torch.Tensor:
        copied.append(span.nbytes)
        return span_of(mirror, span)

    monkeypatch.setattr(HostMirror, "span", span)
    torch.cuda.reset_peak_memory_stats()
    held_bytes = torch.cuda.memory_allocated()
    weights.offload()
    assert copied == []
    assert torch.cuda.max_memory_allocated() - held_bytes < 256 * MB, "no full-size temporary"
    weights.restore()
    tensors["0"][20 * MB] ^= 1
    weights.offload()
    assert copied[-1] <= 8 * MB


def test_all_memory_goes_back_to_the_driver(device: CudaDevice, make: Make) -> None:
    weights, tensors, copies = make.of_sizes(*[512 * 1024] * 200, 200 * MB, *[100] * 1000)
    device.settle()
    for _ in range(3):
        weights.offload()
        away = torch.cuda.memory_reserved(), device.memory()
        weights.restore()
        here = torch.cuda.memory_reserved(), device.memory()
        assert here[0] - away[0] >= weights.device_bytes
        assert here[0] - away[0] < weights.device_bytes * 1.1 + 256 * MB
        assert away[1].free_bytes is not None
        assert here[1].free_bytes is not None
        assert away[1].free_bytes - here[1].free_bytes >= weights.device_bytes * 0.95
    assert all_equal(tensors, copies)
    weights.offload()
    assert torch.cuda.memory_allocated() < 32 * MB
    assert torch.cuda.memory_reserved() < 64 * MB


def test_activations_of_the_engine_do_not_keep_the_weights_segments(device: CudaDevice, make: Make) -> None:
    weights, _, _ = make.of_sizes(*[100 * 1024] * 500)
    weights.offload()
    empty = torch.cuda.memory_reserved()
    weights.restore()
    activations = [torch.ones(1000, device="cuda") for _ in range(50)]
    weights.offload()
    assert torch.cuda.memory_reserved() - empty <= 4 * MB
    assert all(int(one.sum()) == 1000 for one in activations)


def test_a_card_that_fills_up_half_way_leaves_the_host_copy_whole(make: Make, leave: Leave) -> None:
    weights, tensors, copies = make.of_sizes(*[32 * MB] * 8)
    weights.offload()
    reserved = torch.cuda.memory_reserved()
    leave(100 * MB)
    with pytest.raises(DeviceOutOfMemory) as error:
        weights.restore()
    assert error.value.needed_bytes > 0
    assert (weights.device_bytes, weights.host_bytes) == (0, 256 * MB)
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors.values())
    assert torch.cuda.memory_reserved() == reserved
    leave(None)
    weights.restore()
    assert all_equal(tensors, copies)


def test_a_full_card_is_no_reason_to_lose_a_snapshot(device: CudaDevice, leave: Leave, tmp_path: Path) -> None:
    with GPUResourceManager(device, snapshot_dir=tmp_path) as manager:
        manager.register("m", lambda: [random_bytes(128 * MB)])
        with manager.lease("m") as engine:
            before = engine[0].cpu()
        manager.release("m")
        leave(64 * MB)
        with pytest.raises(DeviceOutOfMemory), manager.lease("m"):
            pass
        assert manager.status()["models"]["m"]["state"] == "released"
        leave(None)
        with manager.lease("m") as again:
            assert again is engine
            assert torch.equal(engine[0].cpu(), before)


def test_whatever_card_the_thread_has_chosen_the_managed_one_is_used(make: Make) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    weights, tensors, copies = make.of_sizes(9 * MB, 1000, 1001)
    with torch.cuda.device(1):
        for _ in range(2):
            late = torch.randint(0, 256, (9 * MB,), dtype=torch.uint8).pin_memory()
            with torch.cuda.device(0), torch.cuda.stream(torch.cuda.Stream(0)):
                tensors["0"].copy_(late, non_blocking=True)
            weights.offload()
            assert torch.cuda.memory_reserved(0) < 4 * MB
            weights.restore()
            assert all_equal(tensors, [late, *copies[1:]])
        assert torch.cuda.memory_reserved(1) == 0
        assert torch.cuda.current_device() == 1


def test_a_field_of_one_value_is_refilled_on_the_device(device: CudaDevice, make: Make) -> None:
    tensors = {
        "zeros": torch.zeros(4 * MB, device="cuda"),
        "minus": torch.full((4 * MB,), -0.0, device="cuda"),
        "nan": torch.full((4 * MB,), float("nan"), dtype=torch.bfloat16, device="cuda"),
    }
    before = [tensor.view(torch.uint8).cpu() for tensor in tensors.values()]
    weights = make(tensors)
    weights.offload()
    assert weights.host_bytes == 0
    weights.restore()
    after = [tensor.view(torch.uint8).cpu() for tensor in tensors.values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    tensors["zeros"][MB] = -0.0
    weights.offload()
    weights.restore()
    assert torch.signbit(tensors["zeros"]).nonzero().tolist() == [[MB]]


def test_an_engine_comes_back_from_its_snapshot(device: CudaDevice, tmp_path: Path) -> None:
    engine = torch.nn.Sequential(torch.nn.Linear(1000, 1000), torch.nn.Linear(1000, 1000)).to("cuda", torch.bfloat16)
    x = torch.randn(3, 1000, device="cuda", dtype=torch.bfloat16)
    before = engine(x)
    resident = EngineResident(engine, device)
    store = SnapshotFolder(tmp_path)
    resident.save(store, "m")
    assert (resident.device_bytes, resident.host_bytes) == (0, 0)
    resident.load(store, "m")
    resident.restore()
    assert torch.equal(engine(x), before)
    resident.release()


def test_what_lives_in_main_memory_stays_there(device: CudaDevice, make: Make) -> None:
    tensors = {"here": torch.ones(1000, device="cuda"), "there": torch.ones(1000)}
    weights = make(tensors)
    assert (weights.device_bytes, weights.host_bytes) == (4000, 4000)
    weights.offload()
    assert tensors["there"].sum() == 1000
    assert weights.host_bytes == 8000


def test_sessions_on_the_card_are_rebuilt_with_an_arena_that_gives_memory_back(device: CudaDevice) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs an ONNX Runtime with CUDA")
    model = Path(str(importlib.util.find_spec("hibari").origin)).parent / "assets" / "oov.onnx"
    session = onnxruntime.InferenceSession(str(model), providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    if "CUDAExecutionProvider" not in session.get_providers():
        pytest.skip("ONNX Runtime could not load its CUDA libraries")
    feed = {"chars": np.array([[1, 2, 3]], np.int64)}
    before = session.run(None, feed)
    sessions = OnnxSessions({"model": session}, device)
    assert sessions.device_bytes == model.stat().st_size
    sessions.offload()
    assert session._sess is None
    sessions.restore()
    assert session.get_provider_options()["CUDAExecutionProvider"]["arena_extend_strategy"] == "kSameAsRequested"
    after = session.run(None, feed)
    assert all(np.allclose(one, other, atol=1e-4) for one, other in zip(before, after, strict=True))
    sessions.release()


def require_capture() -> None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin()
            graph.capture_end()
    except RuntimeError as error:
        pytest.skip(f"needs a CUDA runtime that captures graphs: {error}".partition("\n")[0])


def test_an_engine_with_a_captured_graph_stays_until_it_is_released_and_then_leaves_nothing(device: CudaDevice) -> None:
    require_capture()

    class Engine:
        def __init__(self) -> None:
            self.weight, self.x, self.graph = torch.ones(MB, device="cuda"), torch.ones(MB, device="cuda"), None

        def run(self) -> float:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.y = self.x * self.weight
            self.x.fill_(3)
            self.graph.replay()
            return self.y.sum().item()

    before_bytes = torch.cuda.memory_reserved()
    with GPUResourceManager(device) as manager:
        manager.register("tts", Engine)
        for _ in range(2):
            with manager.lease("tts") as engine:
                assert engine.run() == 3 * MB
            assert manager.status()["models"]["tts"]["state"] == "gpu"
        del engine
        manager.release("tts")
        assert torch.cuda.memory_reserved() <= before_bytes


def test_a_move_waits_for_the_end_of_a_capture_and_both_succeed(device: CudaDevice) -> None:
    require_capture()
    x = torch.ones(MB, device="cuda")
    begun, end, graph = threading.Event(), threading.Event(), torch.cuda.CUDAGraph()

    def capture() -> None:
        with torch.cuda.graph(graph):
            x.mul_(2)
            begun.set()
            assert end.wait(60)

    with GPUResourceManager(device) as manager, ThreadPoolExecutor() as pool:
        manager.register("m", lambda: [random_bytes(9 * MB)], keep_warm=-1)
        with manager.lease("m") as engine:
            before = engine[0].cpu()
        captured = pool.submit(capture)
        assert begun.wait(60)
        offloaded = pool.submit(manager.offload, "m")
        with pytest.raises(TimeoutError):
            offloaded.result(1)
        end.set()
        captured.result(60)
        assert offloaded.result(60)
        graph.replay()
        assert int(x.sum()) == 2 * MB
        with manager.lease("m") as engine:
            assert torch.equal(engine[0].cpu(), before)


def test_a_shared_mirror_is_pinned_and_its_weights_can_be_taken(device: CudaDevice) -> None:
    engine = torch.nn.Linear(1000, 600, device="cuda")
    before, named = engine.weight.cpu(), named_tensors(engine, [""])
    weights = Weights(dict(named[""]), device)
    weights.mirror.shared = True
    weights.offload()
    assert weights.mirror.pinning is not None
    weights.mirror.pinning.join()
    assert weights.mirror.memory.pinned_bytes == weights.mirror.nbytes
    with offered(index_of(weights, named)):
        kept = kept_weights("")
    assert kept is not None
    assert torch.equal(kept["weight"], before)
    weights.restore()
    assert torch.equal(engine.weight.cpu(), before)
    weights.release()
