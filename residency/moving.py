"""The hands: what a move does to a model's engine and resident. Knows no locks and no other models."""

from __future__ import annotations

import gc
import logging

from .contracts import Adopt, Device, Resident, SnapshotStore
from .randomness import preserved_random_state
from .states import Move, Slot, State

logger = logging.getLogger(__name__)


class Mover:
    """Carries out moves on one device. ``adopt`` finds what of a fresh engine holds memory.

    With ``snapshots``, a release keeps the engine as a skeleton and its weights on disk, and the next load reads
    them back instead of building the engine again; if that does not work the engine is built the normal way.

    The caller sees to it that a slot's state says that it is moving, so that nobody else touches its engine.
    """

    def __init__(self, device: Device, adopt: Adopt, snapshots: SnapshotStore | None = None) -> None:
        self._device = device
        self._adopt = adopt
        # Where nothing leaves the device, a skeleton would keep everything in memory.
        self._snapshots = snapshots if device.separate else None

    def carry_out(self, slot: Slot, move: Move) -> int:
        """Do ``move`` and return the bytes that changed place; on an error the engine is where it was before."""
        if move.via is State.LOADING:
            return self._wake(slot) or self._load(slot)
        resident = slot.resident
        assert resident is not None, "a model on device or host has a resident"
        if move.via is State.RESTORING:
            return resident.restore()
        if move.via is State.OFFLOADING:
            return resident.offload()
        return self._sleep(slot, resident) or self.forget(slot)

    def forget(self, slot: Slot) -> int:
        """Give up an engine altogether; return the bytes freed."""
        resident, slot.engine, slot.resident = slot.resident, None, None
        freed_bytes = resident.release() if resident else 0
        gc.collect()
        self._device.settle()
        return freed_bytes

    def _load(self, slot: Slot) -> int:
        self._device.ensure_usable()
        if slot.kept is not None:
            slot.kept.restore()
        try:
            with preserved_random_state():
                engine = slot.load()
            if engine is None:
                raise TypeError(f"The loader of {slot.name!r} returned None; let it return the engine.")
            slot.resident = self._adopt(engine, self._device, slot)
        except BaseException:
            if slot.kept is not None:
                slot.kept.offload()
            raise
        slot.engine = engine
        return slot.resident.device_bytes + slot.resident.host_bytes

    def _sleep(self, slot: Slot, resident: Resident) -> int:
        """Release into a snapshot; 0 if there is none to be had."""
        if self._snapshots is None or slot.closing:
            return 0
        try:
            freed_bytes = resident.save(self._snapshots, slot.name)
        except Exception as error:
            # Whatever it is: somebody wants the memory.
            logger.warning("%s: released without a snapshot. %s", slot.name, error)
            return 0
        self._device.settle()
        return freed_bytes

    def _wake(self, slot: Slot) -> int:
        """Load from a snapshot; 0 if the engine has to be built."""
        resident = slot.resident
        if resident is None or self._snapshots is None:
            return 0
        try:
            resident.load(self._snapshots, slot.name)
        except Exception as error:
            # Whatever it is: the loader can still build the engine.
            logger.warning("%s: loaded without its snapshot. %s", slot.name, error)
            self.forget(slot)
            return 0
        try:
            return resident.restore()
        except BaseException:
            if not self._sleep(slot, resident):
                self.forget(slot)
            raise
