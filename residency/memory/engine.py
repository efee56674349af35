"""Residents that move as one: any parts, and an engine with its memory at the load and the memory added since."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from operator import methodcaller
from typing import TYPE_CHECKING, Any

from ..contracts import Device
from ..errors import CapturedGraphs, DeviceOutOfMemory, OnAnotherDevice, SharedWeights, WeightsGone
from . import absent_tensors
from .discovery import Discovery, Found, compiled_graphs
from .holders import are_managed, held_elsewhere, in_held_containers, note_arrays
from .onnx_sessions import OnnxSessions
from .resident import Resident
from .self_moving import moves_of
from .self_moving.part import SelfMovingPart, is_managed
from .snapshot import SnapshotFolder
from .storages import by_storage, storage_key
from .weights import Weights

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class CompositeResident:
    """Residents that are restored in order and offloaded in reverse; if one fails, the moved ones are moved back."""

    def __init__(self, *parts: Resident) -> None:
        self._parts = parts

    @property
    def parts(self) -> tuple[Resident, ...]:
        return self._parts

    @property
    def device_bytes(self) -> int:
        return sum(part.device_bytes for part in self.parts)

    @property
    def host_bytes(self) -> int:
        return sum(part.host_bytes for part in self.parts)

    @property
    def array_bytes(self) -> int:
        """The sum over the parts that report it; see `EngineResident.array_bytes`."""
        return sum(getattr(part, "array_bytes", 0) for part in self.parts)

    @property
    def usable(self) -> bool:
        """False if a part has failed so that only a new engine can serve requests; see `SelfMovingPart.usable`."""
        return all(getattr(part, "usable", True) for part in self.parts)

    @property
    def moves_itself(self) -> bool:
        """Whether an offload may free memory of still unknown size; see `SelfMovingPart`."""
        return any(getattr(part, "moves_itself", False) for part in self.parts)

    def restore(self) -> int:
        return _all_or_nothing(self.parts, _RESTORE, _OFFLOAD, undo_failed=True)

    def offload(self) -> int:
        return _all_or_nothing(self.parts[::-1], _OFFLOAD, _RESTORE, undo_failed=True)

    def release(self) -> int:
        return sum(part.release() for part in self.parts)

    def save(self, store: SnapshotFolder, name: str) -> int:
        return _all_or_nothing(self.parts, methodcaller("save", store, name), methodcaller("load", store, name))

    def load(self, store: SnapshotFolder, name: str) -> int:
        try:
            return sum(part.load(store, name) for part in self.parts)
        except BaseException:
            self.release()
            raise


_Move = Callable[[Resident], int]
_RESTORE: _Move = methodcaller("restore")
_OFFLOAD: _Move = methodcaller("offload")


def _all_or_nothing(parts: tuple[Resident, ...], move: _Move, undo: _Move, undo_failed: bool = False) -> int:
    """Undoes all moves if one fails.

    ``undo_failed``: also that of the failed part, which may have moved; only for an ``undo`` without effect otherwise.
    """
    moved_bytes = 0
    for index, part in enumerate(parts):
        try:
            moved_bytes += move(part)
        except BaseException:
            for moved in reversed(parts[: index + undo_failed]):
                undo(moved)
            raise
    return moved_bytes


class EngineResident(CompositeResident):
    """All memory of an engine, found by a walk at the load and again before each offload.

    Engines create tensors as they work (caches, weights computed anew in each pass). Those still reachable from the
    engine at an offload move with it. An engine with captured CUDA graphs stays on the device until its release
    (`CapturedGraphs`): a graph contains addresses, and restored weights have others.
    """

    def __init__(
        self, engine: Any, device: Device, skip: Collection[str] = (), excluding: EngineResident | None = None
    ) -> None:
        """Finds the memory and charges the device; after an error, nothing remains charged.

        Args:
            skip: attribute paths of the engine (``.tokenizer``) that are not moved.
            excluding: a borrowed part; its tensors and sessions are managed separately.

        Raises:
            DeviceOutOfMemory: the device cannot hold the engine.
            SharedWeights: some of the bytes belong to another model.
            OnAnotherDevice: some of the bytes are on a GPU other than the managed one.
            WeightsGone: the engine was released before.
        """
        self._device = device
        self._engine_id = id(engine)
        self._discovery = Discovery(engine, skip)
        self._excluding = excluding
        #: The storage of each tensor (``id``) in the last walk, if all of them are managed here.
        self._known: dict[int, int | None] | None = None
        found = self._discovery.walk()
        self._array_bytes = found.array_bytes
        held = self._held(found)
        keys = _bring_back(found, _keys(found))
        note_arrays(found.tensors.values(), found.borrowing)
        without = [tensor for tensor in found.tensors.values() if keys[id(tensor)] is None]
        emptied = found.tensors.only([tensor for tensor in without if _is_emptied(tensor)])
        borrowed = {id(part.thing) for part in excluding._self_moving} if excluding else set()
        others = {path: thing for path, thing in found.self_moving.items() if id(thing) not in borrowed}
        if shared := tuple(path for path, thing in others.items() if is_managed(thing)):
            raise SharedWeights(shared)
        if emptied:
            raise SharedWeights(tuple(emptied)) if are_managed(emptied.values()) else WeightsGone(tuple(emptied))
        self._loaded = self._added = Weights({}, device)
        self._loaded = self._weights(found, keys, held, ephemeral=False)
        self._remember(keys)
        self._self_moving: list[SelfMovingPart] = []
        try:
            claimed = excluding.sessions if excluding else frozenset()
            sessions = {path: session for path, session in found.sessions.items() if id(session) not in claimed}
            self._sessions = OnnxSessions(sessions, device)
        except BaseException:
            self._abandon()
            raise
        self._find_self_moving(found)

    @property
    def array_bytes(self) -> int:
        """Main memory of numpy arrays reachable from the engine, as of the last walk. They do not move."""
        return self._array_bytes

    @property
    def storage_keys(self) -> frozenset[int]:
        excluding = self._excluding.storage_keys if self._excluding else frozenset()
        return self._loaded.storage_keys | self._added.storage_keys | excluding

    @property
    def usable(self) -> bool:
        # Read for each request.
        return not self._self_moving or super().usable

    @property
    def sessions(self) -> frozenset[int]:
        """The sessions accounted for here (``id``)."""
        return self._sessions.sessions

    @property
    def parts(self) -> tuple[Resident, ...]:
        return self._loaded, self._added, self._sessions, *self._self_moving

    def offload(self) -> int:
        self._find_added()
        return super().offload()

    def save(self, store: SnapshotFolder, name: str) -> int:
        for part in self._self_moving:
            part.save(store, name)  # refuses before anything is written
        self._find_added()
        return super().save(store, name)

    def _abandon(self) -> None:
        self._loaded.release()

    def _find_added(self) -> None:
        if not self._loaded.on_device:
            return
        if self._excluding:
            self._excluding._find_added()  # its new tensors outlive this engine too
        now = self._discovery.walk()
        self._array_bytes = now.array_bytes
        note_arrays(now.tensors.values(), now.borrowing)
        self._find_self_moving(now)
        graphs = (*now.graphs, *compiled_graphs(now.tensors))
        if graphs:
            raise CapturedGraphs(graphs)
        keys = _keys(now)
        if keys == self._known and not (self._loaded.has_common or self._added.has_common):
            return
        there = {key for key in keys.values() if key is not None}
        self._loaded.keep_only(there)
        self._loaded.update_tensors(by_storage(now.tensors))
        if self._added.keep_only(there) or not there <= self.storage_keys:
            self._added.keep_only(())
            self._added = Weights({}, self._device)
            try:
                self._added = self._weights(now, keys, self._held(now), ephemeral=True)
            except (DeviceOutOfMemory, OnAnotherDevice, SharedWeights) as error:
                logger.warning("Tensors created since the load stay on the device: %s", error)
        self._remember(keys)

    def _find_self_moving(self, found: Found) -> None:
        """Adds objects that appeared since, and drops those that the engine has dropped."""
        known = {id(part.thing): part for part in self._self_moving}
        if self._excluding:
            known.update((id(part.thing), part) for part in self._excluding._self_moving)
        there = {id(thing) for thing in found.self_moving.values()}
        for part in [part for part in self._self_moving if id(part.thing) not in there]:
            part.end_management()
            self._self_moving.remove(part)
        if there <= known.keys():
            return
        for path, thing in found.self_moving.items():
            if id(thing) not in known and not is_managed(thing) and (moves := moves_of(type(thing))) is not None:
                self._self_moving.append(SelfMovingPart(path, thing, moves, self._device))

    def _weights(self, found: Found, keys: Mapping[int, int | None], held: frozenset[int], ephemeral: bool) -> Weights:
        """Returns the `Weights` of the tensors that are not accounted for yet."""
        claimed = self.storage_keys
        unclaimed = [tensor for tensor in found.tensors.values() if keys[id(tensor)] not in claimed]
        return Weights(found.tensors.only(unclaimed), self._device, ephemeral, held)

    def _held(self, found: Found) -> frozenset[int]:
        """Returns the tensors (``id``) with references from outside the engine, to them or to containers of them."""
        tensors = found.tensors.values()
        held = held_elsewhere(tensors, found.references) - {self._engine_id}
        held |= in_held_containers(found.entered, tensors, self._engine_id)
        # A traceback may keep these objects alive, and the next walk would count it as another holder.
        found.entered.clear()
        return held

    def _remember(self, keys: dict[int, int | None]) -> None:
        # Only if all are accounted for here: the ``id`` of a freed object may be reused.
        held = self.storage_keys
        self._known = keys if held.issuperset(filter(None, keys.values())) else None


def _keys(found: Found) -> dict[int, int | None]:
    return {id(tensor): storage_key(tensor) for tensor in found.tensors.values()}


def _bring_back(found: Found, keys: dict[int, int | None]) -> dict[int, int | None]:
    """Fills storages that were emptied with another engine, if they are held elsewhere too; returns the new keys."""
    recalled = False
    for tensor in found.tensors.values():
        if keys[id(tensor)] is None and _is_emptied(tensor):
            recalled = absent_tensors.recall(tensor.untyped_storage()) or recalled
    return _keys(found) if recalled else keys


def _is_emptied(tensor: torch.Tensor) -> bool:
    try:
        return not tensor.untyped_storage().nbytes() and tensor.numel() > 0 and tensor.device.type != "meta"
    except Exception:  # no storage
        return False


def adopt(engine: Any, device: Device, managed: Any) -> EngineResident:
    """Returns the memory of a freshly loaded engine, without its borrowed part; see `EngineResident` for the errors."""
    borrowed = managed.borrowed_part
    return EngineResident(engine, device, managed.skip, borrowed if isinstance(borrowed, EngineResident) else None)
