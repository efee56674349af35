"""Pages are locked once, in the background, never during a move or after the mirror is freed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from engine_strategies import small_layout
from fakes import Gate, Worker

from gpu_manager import SimulatedDevice
from residency.memory import SnapshotFolder
from residency.memory.mirror import BackgroundPinning, HostMirror, lay_out
from residency.memory.weights import Weights


class PinDevice(SimulatedDevice):
    """Logs pinned groups, waits at a gate before each, and refuses on request."""

    def __init__(self) -> None:
        super().__init__(1 << 30)
        self.pinned: list[int] = []
        self.gate: Gate | None = None
        self.refuse_after = 1 << 30

    def pin(self, raw: torch.Tensor) -> bool:
        if self.gate:
            gate, self.gate = self.gate, None
            gate.pass_through()
        if len(self.pinned) >= self.refuse_after:
            return False
        self.pinned.append(len(raw))
        return super().pin(raw)


@pytest.fixture
def device() -> PinDevice:
    return PinDevice()


@pytest.fixture
def mirror() -> HostMirror:
    return HostMirror(lay_out([3000] * 10, span_bytes=512, group_bytes=5000))


def tensors() -> dict[str, torch.Tensor]:
    return {str(number): torch.randn(750) for number in range(10)}


def test_all_groups_are_pinned_in_the_background(device: PinDevice, mirror: HostMirror) -> None:
    gate = device.gate = Gate()
    pinning = BackgroundPinning(mirror, device, threading.Lock())
    gate.wait_for_arrival()
    assert mirror.pinned_bytes == 0
    gate.open()
    pinning.join()
    assert device.pinned == [len(group) for group in mirror.groups()]


def test_after_a_refusal_nothing_more_is_tried(device: PinDevice, mirror: HostMirror) -> None:
    device.refuse_after = 2
    BackgroundPinning(mirror, device, threading.Lock()).join()
    assert len(device.pinned) == 2
    assert mirror.pinned_bytes == device.pinned_bytes == sum(device.pinned)


def test_no_page_is_locked_while_bytes_move_or_after_a_stop(device: PinDevice, mirror: HostMirror) -> None:
    moving = threading.Lock()
    with moving:
        pinning = BackgroundPinning(mirror, device, moving)
        pinning.join(0.05)
        assert device.pinned == []
        pinning.stop()
    pinning.join()
    assert device.pinned == []


def test_a_move_waits_for_one_group_and_the_rest_is_pinned_after_it(device: PinDevice) -> None:
    with small_layout(512, 5000):
        weights = Weights(tensors(), device)
        gate = device.gate = Gate()
        weights.offload()
        gate.wait_for_arrival()
        restoring = threading.Thread(target=weights.restore)
        restoring.start()
        restoring.join(0.05)
        assert restoring.is_alive(), "a group is being pinned"
        gate.open()
        restoring.join(30)
        assert weights.mirror.pinning is not None
        weights.mirror.pinning.join()
        assert device.pinned_bytes == weights.host_bytes >= 30_000
        weights.offload()
        assert sum(device.pinned) == device.pinned_bytes, "pinned once, however often it moves"
        weights.release()
        assert device.pinned_bytes == 0


@pytest.mark.parametrize("end", ["release", "save"])
def test_nothing_is_pinned_after_the_mirror_has_gone(device: PinDevice, end: str, tmp_path: Path) -> None:
    with small_layout(512, 5000):
        weights = Weights(tensors(), device)
        gate = device.gate = Gate()
        weights.offload()
        pinning = weights.mirror.pinning
        assert pinning is not None
        gate.wait_for_arrival()
        ending = Worker(weights.release) if end == "release" else Worker(weights.save, SnapshotFolder(tmp_path), "m")
        gate.open()
        assert ending.result() >= 30_000
        pinning.join()
        assert device.pinned_bytes == weights.host_bytes == 0


def test_a_new_layout_is_pinned_anew(device: PinDevice) -> None:
    tensor = torch.zeros(1 << 19)
    weights = Weights({"t": tensor, "u": torch.randn(100)}, device)
    weights.offload()
    assert weights.mirror.pinning is not None
    weights.mirror.pinning.join()
    assert device.pinned_bytes == 400
    weights.restore()
    tensor[5] = 1
    weights.offload()
    weights.mirror.pinning.join()
    assert device.pinned_bytes == weights.host_bytes == (2 << 20) + 400
    weights.release()
    assert device.pinned_bytes == 0


def test_a_mirror_that_nobody_has_any_more_is_pinned_no_further(device: PinDevice) -> None:
    mirror = HostMirror(lay_out([3000] * 10, span_bytes=512, group_bytes=5000))
    count, gate = len(mirror.groups()), Gate()
    device.gate = gate
    pinning = BackgroundPinning(mirror, device, threading.Lock())
    gate.wait_for_arrival()
    del mirror
    gate.open()
    pinning.join()
    assert len(device.pinned) == 1 < count
    assert device.pinned_bytes == 0


def test_an_empty_mirror_asks_for_no_pages(device: PinDevice) -> None:
    weights = Weights({}, device)
    weights.offload()
    if weights.mirror.pinning is not None:
        weights.mirror.pinning.join()
    assert device.pinned == []
