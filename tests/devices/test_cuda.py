"""What is asked of CUDA, when, and on which card: with a ``torch.cuda`` that is played."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest
import torch
from fake_torch_cuda import FakeCuda

from residency.contracts import Memory, Telemetry
from residency.devices import CudaDevice
from residency.devices import cuda as module
from residency.devices.observed import ObservedDevice
from residency.errors import CaptureUnderWay, DeviceLost, DeviceOutOfMemory, DeviceUnavailable


class Probe:
    name, identity = "a card", "GPU-1"

    def memory(self) -> Memory:
        return Memory(1000, 5)

    def telemetry(self) -> Telemetry:
        return Telemetry()

    def holders(self) -> tuple[tuple[int, int | None], ...]:
        return ((77, 995),)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.fixture
def device() -> CudaDevice:
    return CudaDevice("a card", Probe(), index=1)


def always(words: str) -> Callable[[str], None]:
    def fail(call: str) -> None:
        raise RuntimeError(words)

    return fail


def once(words: str) -> Callable[[str], None]:
    left = [words]

    def fail(call: str) -> None:
        if left:
            raise RuntimeError(left.pop())

    return fail


@pytest.mark.parametrize(
    ("fail", "usable"),
    [
        (lambda call: None, True),
        (once("CUDA error: invalid argument"), True),
        (always("CUDA error: an illegal memory access was encountered\nmore of it"), False),
        (always("CUDA error: out of memory"), True),
        (always("CUDA error: operation not permitted when stream is capturing"), True),
    ],
    ids=["answers", "reported once", "reported to every call", "full", "capturing"],
)
def test_a_device_is_lost_that_answers_every_call_with_an_error(
    fail: Callable[[str], None], usable: bool, cuda: FakeCuda, device: CudaDevice
) -> None:
    cuda.fail = fail
    assert device.is_usable() is usable
    assert {name for name, _ in cuda.calls} <= {"Stream", "record", "query"}, "nothing else has to end for it"


def test_a_device_that_is_not_in_use_or_busy_for_long_is_not_lost(
    cuda: FakeCuda, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.busy = True
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(module.time, "monotonic", itertools.count().__next__)
    assert device.is_usable()
    cuda.calls.clear()
    cuda.initialized = False
    for call in (device.is_usable, device.wait, device.settle):
        call()
    assert cuda.calls == [], "no context is made for it"


def test_a_load_is_told_why_the_device_cannot_be_used(cuda: FakeCuda, device: CudaDevice) -> None:
    device.ensure_usable()
    cuda.fail = always("CUDA error: unspecified launch failure\nand much more")
    with pytest.raises(DeviceLost, match="unspecified launch failure") as lost:
        device.ensure_usable()
    assert "much more" not in str(lost.value)
    cuda.fail = always("CUDA error: out of memory")
    with pytest.raises(DeviceOutOfMemory, match="pid 77"):
        device.ensure_usable()
    cuda.available = False
    with pytest.raises(DeviceUnavailable, match="does not see a card"):
        device.ensure_usable()


def test_the_managed_card_is_used_whatever_card_the_thread_has_chosen(cuda: FakeCuda, device: CudaDevice) -> None:
    page = torch.zeros(4096, dtype=torch.uint8)
    device.wait()
    device.settle()
    with device.placing() as pool:
        assert pool == "a pool"
    with device.transfer():
        cuda.log("copy")
    assert device.pin(page)
    device.unpin(page)
    device.is_usable()
    assert {card for _, card in cuda.calls} == {1}
    assert {"synchronize", "empty_cache", "MemPool", "copy", "stream.synchronize", "register", "unregister"} <= {
        name for name, _ in cuda.calls
    }
    assert cuda.current == 0
    assert (device.torch_device, CudaDevice("a card", Probe()).torch_device) == ("cuda:1", "cuda")


def test_captures_of_other_threads_forbid_nothing_that_is_done_here(cuda: FakeCuda, device: CudaDevice) -> None:
    modes: list[int] = []
    cuda.fail = lambda call: modes.append(cuda.modes[-1])
    device.settle()
    with device.placing(), device.transfer():
        pass
    assert set(modes) == {2}, "relaxed"
    assert cuda.modes[-1] == 0, "as it was"


def test_nobody_waits_for_a_card_on_which_a_graph_is_being_captured(
    cuda: FakeCuda, device: CudaDevice, caplog: pytest.LogCaptureFixture
) -> None:
    """It would end the capture, and fail."""
    cuda.captured = {17}
    with pytest.raises(CaptureUnderWay):
        device.wait()
    with caplog.at_level("INFO"):
        device.settle()
    assert "being captured" in caplog.text
    assert not {"synchronize", "empty_cache"} & {name for name, _ in cuda.calls}
    cuda.captured = set()
    device.wait()
    device.settle()
    assert {"synchronize", "empty_cache"} <= {name for name, _ in cuda.calls}


def test_a_capture_that_is_only_noticed_by_cuda_is_named_as_well(cuda: FakeCuda, device: CudaDevice) -> None:
    def fail(call: str) -> None:
        if call in ("synchronize", "empty_cache"):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    cuda.fail = fail
    with pytest.raises(CaptureUnderWay):
        device.wait()
    device.settle()
    cuda.fail = always("CUDA error: unspecified launch failure")
    for call in (device.wait, device.settle):
        with pytest.raises(RuntimeError, match="unspecified"):
            call()


def test_an_allocator_without_pools_is_done_without_one(cuda: FakeCuda, device: CudaDevice) -> None:
    cuda.backend = "cudaMallocAsync"
    with device.placing() as pool:
        cuda.log("allocate")
    assert pool is None
    calls = [name for name, _ in cuda.calls]
    assert "MemPool" not in calls
    assert calls.index("stream.synchronize") > calls.index("allocate"), "what was allocated is there for all streams"
    cuda.calls.clear()
    device.settle()
    calls = [name for name, _ in cuda.calls]
    assert calls.index("synchronize") < calls.index("empty_cache"), "it frees in the order of streams"


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to allocate", "CUDA driver error: out of memory"])
def test_a_full_card_is_named_with_those_who_fill_it(
    words: str, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(storage: torch.UntypedStorage, nbytes: int) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(torch.UntypedStorage, "resize_", refuse)
    with pytest.raises(DeviceOutOfMemory, match="pid 77: 995") as full:
        device.allocate(torch.zeros(1).untyped_storage(), 100)
    assert (full.value.needed_bytes, full.value.free_bytes) == (100, 5)


def test_pages_may_be_unpinned_by_a_garbage_collection_while_others_are_pinned(
    cuda: FakeCuda, device: CudaDevice
) -> None:
    first, second = torch.zeros(4096, dtype=torch.uint8), torch.zeros(8192, dtype=torch.uint8)
    assert device.pin(first)
    cuda.fail = lambda call: device.unpin(first) if call == "register" else None
    assert device.pin(second)
    assert device._pinned_bytes == 8192


def test_what_torch_keeps_free_is_that_of_the_managed_card(
    cuda: FakeCuda, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Probe, "holders", lambda self: ((77, 100), (os.getpid(), 1000)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: {1: 500}[index])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: {1: 300}[index])
    assert device.held_by() == {77: 100, os.getpid(): 800}


@pytest.mark.parametrize("processes", [(), ((77, 100),), ((77, None),)])
def test_a_driver_that_does_not_list_this_process_tells_nothing(
    processes: tuple[tuple[int, int | None], ...], device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Probe, "holders", lambda self: processes)
    assert device.held_by() is None


@pytest.mark.parametrize(
    ("processes", "nbytes"),
    [(((77, 100), (78, 30), (9, 5)), 130), (((78, 30),), 30), ((), None), (((77, None),), None)],
)
def test_the_bytes_of_worker_processes_are_known_if_the_driver_lists_them(
    processes: tuple[tuple[int, int | None], ...],
    nbytes: int | None,
    device: CudaDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Probe, "holders", lambda self: processes)
    assert device.bytes_of([77, 78]) == nbytes, "none of this process is listed, as with process isolation"


def test_a_process_that_only_observes_the_card_holds_nothing_there(device: CudaDevice) -> None:
    observed = ObservedDevice(device)
    assert device.memory().process_bytes is None, "the driver lists others only"
    assert observed.memory() == Memory(1000, 5, 0)
    assert observed.bytes_of([77, 78]) == 995
