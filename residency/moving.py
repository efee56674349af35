"""The hands: what a move does to a model's engine and resident. Knows no locks and no other models."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from .contracts import Device, Resident
from .randomness import preserved_random_state
from .states import Move, Slot, State


class Mover:
    """Carries out moves on one device. ``adopt`` finds what of a fresh engine holds memory.

    The caller sees to it that a slot's state says that it is moving, so that nobody else touches its engine.
    """

    def __init__(self, device: Device, adopt: Callable[[Any, Device], Resident]) -> None:
        self._device = device
        self._adopt = adopt

    def carry_out(self, slot: Slot, move: Move) -> int:
        """Do ``move`` and return the bytes that changed place; on an error the engine is where it was before."""
        if move.via is State.LOADING:
            return self._load(slot)
        resident = slot.resident
        assert resident is not None, "a model on device or host has a resident"
        if move.via is State.RESTORING:
            return resident.restore()
        if move.via is State.OFFLOADING:
            return resident.offload()
        slot.engine = slot.resident = None
        released_bytes = resident.release()
        gc.collect()
        self._device.settle()
        return released_bytes

    def _load(self, slot: Slot) -> int:
        self._device.ensure_usable()
        with preserved_random_state():
            engine = slot.load()
        slot.resident = self._adopt(engine, self._device)
        slot.engine = engine
        return slot.resident.device_bytes + slot.resident.host_bytes
