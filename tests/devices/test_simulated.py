from __future__ import annotations

import pytest
import torch

from gpu_manager import DeviceOutOfMemory, SimulatedDevice


def test_it_calls_itself_simulated_wherever_it_is_named() -> None:
    device = SimulatedDevice(capacity_bytes=48 << 30)
    assert device.name == "Simulated GPU (48 GB) / 模拟 GPU"
    assert device.kind == "simulated"
    assert "Simulated" in device.note["en"]
    assert "模拟" in device.note["zh"]
    with pytest.raises(DeviceOutOfMemory, match="Simulated GPU"):
        device.charge(49 << 30)


def test_the_ledger_counts_what_is_charged_allocated_dropped_and_refunded() -> None:
    device = SimulatedDevice(capacity_bytes=1000)
    device.charge(400)
    storage = torch.UntypedStorage(0)
    device.allocate(storage, 500)
    assert storage.nbytes() == 500
    assert (device.memory().total_bytes, device.memory().free_bytes, device.memory().process_bytes) == (1000, 100, 900)
    with pytest.raises(DeviceOutOfMemory) as error:
        device.allocate(torch.UntypedStorage(0), 101)
    assert (error.value.needed_bytes, error.value.free_bytes) == (101, 100)
    device.drop(storage)
    device.refund(400)
    assert device.ledger_bytes == 0


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_card_has_a_size(capacity: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        SimulatedDevice(capacity)
