"""An engine as one resident: what it held when it was loaded, and what it has come to hold since."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ..contracts import Device, SnapshotStore
from ..errors import DeviceOutOfMemory
from .composite import CompositeResident
from .discovery import Discovery, Found
from .onnx import OnnxSessions
from .weights import Weights

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class EngineResident:
    """Everything of an engine that holds memory, found by walking it at the load and again before each offload.

    Engines make tensors as they work (caches, weights computed anew at each pass). Those that still hang on the
    engine when it leaves the device leave with it.
    """

    def __init__(self, engine: Any, device: Device, skip: Collection[str] = ()) -> None:
        """Take stock and charge the device; `DeviceOutOfMemory` if it cannot hold the engine. Then nothing is kept."""
        self._device = device
        self._discovery = Discovery(engine, skip)
        self._found = self._discovery.walk()
        self._loaded = _resident(self._found, device)
        self._late_storages: frozenset[int] = frozenset()
        self._late = Weights({}, device)

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
        self._find_latecomers()
        return self._all.save(store, name)

    def load(self, store: SnapshotStore, name: str) -> int:
        return self._all.load(store, name)

    @property
    def _all(self) -> CompositeResident:
        return CompositeResident(self._loaded, self._late)

    def _find_latecomers(self) -> None:
        if not self._loaded.device_bytes:
            return
        now = self._discovery.walk()
        known = _storages(self._found.tensors)
        tensors = {path: tensor for path, tensor in now.tensors.items() if _storage(tensor) not in known}
        storages = _storages(tensors)
        if storages == self._late_storages:
            return
        self._late.let_go()
        try:
            self._late, self._late_storages = Weights(tensors, self._device), storages
        except DeviceOutOfMemory as error:
            self._late, self._late_storages = Weights({}, self._device), frozenset()
            logger.warning("%s tensors made since the load stay on the device: %s", len(tensors), error)


def _resident(found: Found, device: Device) -> CompositeResident:
    return CompositeResident.build(
        lambda: Weights(found.tensors, device),
        lambda: OnnxSessions(found.sessions, device),
    )


def _storages(tensors: dict[str, torch.Tensor]) -> frozenset[int]:
    return frozenset(key for key in map(_storage, tensors.values()) if key is not None)


def _storage(tensor: torch.Tensor) -> int | None:
    """What two tensors over the same bytes have in common; None for those without bytes of their own."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
    return storage._cdata if storage.nbytes() else None
