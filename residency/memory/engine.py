"""An engine as one resident: its memory at the load, and memory added since."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..contracts import Device, SnapshotStore
from ..errors import (
    CapturedGraphs,
    DeviceOutOfMemory,
    OnAnotherDevice,
    SharedWeights,
    WeightsGone,
)
from . import absent_tensors
from .composite import CompositeResident
from .cuda_graphs import compiled_graphs
from .discovery import Discovery, Found
from .holders import held_elsewhere, note_arrays
from .onnx_sessions import OnnxSessions
from .self_moving import moves_of
from .self_moving.part import SelfMovingPart
from .shared_containers import in_held_containers
from .storage_owners import are_managed
from .storages import by_storage, storage_key
from .weights import Weights

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class EngineResident:
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
        #: The storage of each tensor (``id``) in the last walk, if all of them are accounted for here.
        self._known: dict[int, int | None] | None = None
        found = self._discovery.walk()
        self._array_bytes = found.array_bytes
        held = self._held(found)
        keys = _bring_back(found, _keys(found))
        note_arrays(found.tensors.values(), found.borrowing)
        without = [tensor for tensor in found.tensors.values() if keys[id(tensor)] is None]
        emptied = found.tensors.only([tensor for tensor in without if _is_emptied(tensor)])
        if emptied:
            raise SharedWeights(tuple(emptied)) if are_managed(emptied.values()) else WeightsGone(tuple(emptied))
        self._loaded = self._late = Weights({}, device)
        self._loaded = self._weights(found, keys, held, ephemeral=False)
        self._remember(keys)
        self._self_moving: list[SelfMovingPart] = []
        try:
            self._sessions = OnnxSessions(self._unclaimed_sessions(found), device)
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
        return self._loaded.storage_keys | self._late.storage_keys | excluding

    @property
    def sessions(self) -> frozenset[int]:
        """The sessions accounted for here (``id``)."""
        return self._sessions.sessions

    @property
    def usable(self) -> bool:
        """Whether the worker processes of its parts are alive."""
        return all(part.usable for part in self._self_moving)

    @property
    def device_bytes(self) -> int:
        return self._all.device_bytes

    @property
    def host_bytes(self) -> int:
        return self._all.host_bytes

    def offload(self) -> int:
        self._find_latecomers()
        return self._all.offload()

    def restore(self) -> int:
        return self._all.restore()

    def release(self) -> int:
        return self._all.release()

    def save(self, store: SnapshotStore, name: str) -> int:
        for part in self._self_moving:
            part.save(store, name)  # refuses before anything is written
        self._find_latecomers()
        return self._all.save(store, name)

    def load(self, store: SnapshotStore, name: str) -> int:
        return self._all.load(store, name)

    @property
    def _all(self) -> CompositeResident:
        return CompositeResident(self._loaded, self._late, self._sessions, *self._self_moving)

    def _abandon(self) -> None:
        self._loaded.release()

    def _find_latecomers(self) -> None:
        if not self._loaded.on_device:
            return
        if self._excluding:
            self._excluding._find_latecomers()  # its new tensors outlive this engine too
        now = self._discovery.walk()
        self._array_bytes = now.array_bytes
        note_arrays(now.tensors.values(), now.borrowing)
        self._find_self_moving(now)
        graphs = (*now.graphs, *compiled_graphs(now.tensors))
        if graphs:
            raise CapturedGraphs(graphs)
        keys = _keys(now)
        if keys == self._known and not (self._loaded.has_common or self._late.has_common):
            return
        there = {key for key in keys.values() if key is not None}
        self._loaded.keep_only(there)
        self._loaded.also(by_storage(now.tensors))
        if self._late.keep_only(there) or not there <= self.storage_keys:
            self._late.keep_only(())
            self._late = Weights({}, self._device)
            try:
                self._late = self._weights(now, keys, self._held(now), ephemeral=True)
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
            part.let_go()
            self._self_moving.remove(part)
        if there <= known.keys():
            return
        for path, thing in found.self_moving.items():
            if id(thing) not in known and (moves := moves_of(type(thing))) is not None:
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

    def _unclaimed_sessions(self, found: Found) -> dict[str, Any]:
        claimed = self._excluding.sessions if self._excluding else frozenset()
        return {path: session for path, session in found.sessions.items() if id(session) not in claimed}


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
