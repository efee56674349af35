"""Tensors, moved by their unique storages: ties, views and tensor identity survive because only bytes move.

A storage is emptied with ``resize_(0)`` and filled again with ``resize_(n)`` and a copy, as PyTorch's FSDP2
does (``torch/distributed/fsdp/_fully_shard/_fsdp_param.py``); every tensor over it stays the object it was.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..contracts import Device

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass
class _Piece:
    """One unique storage, the tensors over it by path, and its copy on the host while it is off the device."""

    storage: torch.UntypedStorage
    tensors: dict[str, torch.Tensor]
    nbytes: int
    mirror: torch.UntypedStorage | None = None

    def make_resizable(self) -> bool:
        """Give the tensors a storage that can be emptied and filled, if theirs cannot; False if they refuse.

        Bytes that came from a file (TorchScript, safetensors, mmap) or from numpy, or that numpy looks at, belong
        to somebody else and cannot be resized: they are copied into a storage of torch's own.
        """
        if self.storage.resizable():
            return True
        home = _empty_storage(self.nbytes, self.storage.device)
        home.copy_(self.storage)
        try:
            self._move_tensors_to(home)
        except RuntimeError as error:
            self._move_tensors_to(self.storage)
            logger.warning("%s cannot be moved and stays where it is: %s", ", ".join(self.tensors), error)
            return False
        self.storage = home
        return True

    def _move_tensors_to(self, storage: torch.UntypedStorage) -> None:
        import torch

        # inference_mode, so that inference tensors and leaves that require grad may be given a storage alike.
        with torch.inference_mode():
            for tensor in self.tensors.values():
                if tensor.untyped_storage()._cdata != storage._cdata:
                    tensor.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


class Weights:
    """The tensors of one engine. Storages that the device does not hold stay where they are and are only counted.

    Offload copies every storage to the host before it frees the first; restore frees host copies only once all
    are back. An error in either leaves everything as it was.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: Device) -> None:
        """Take stock of ``tensors`` (by path, for messages) and charge the device; `DeviceOutOfMemory` if too many."""
        self._device = device
        self._pieces: list[_Piece] = []
        self._elsewhere_bytes = 0
        for piece in _pieces(tensors):
            movable = all(map(device.holds_tensor, piece.tensors.values())) and piece.make_resizable()
            if movable:
                self._pieces.append(piece)
            else:
                self._elsewhere_bytes += piece.nbytes
        self._on_device = True
        device.charge(self._movable_bytes)

    @property
    def _movable_bytes(self) -> int:
        return sum(piece.nbytes for piece in self._pieces)

    @property
    def device_bytes(self) -> int:
        return sum(piece.storage.nbytes() for piece in self._pieces)

    @property
    def host_bytes(self) -> int:
        return self._elsewhere_bytes + sum(piece.nbytes for piece in self._pieces if piece.mirror)

    def offload(self) -> int:
        if not self._on_device:
            return 0
        try:
            for piece in self._pieces:
                if not piece.make_resizable():
                    raise RuntimeError(f"{', '.join(piece.tensors)} cannot leave the device")
                piece.mirror = _empty_storage(piece.nbytes)
                piece.mirror.copy_(piece.storage)
        except BaseException:
            self._drop_mirrors()
            raise
        self._on_device = False
        self._empty()
        return self._movable_bytes

    def restore(self) -> int:
        if self._on_device:
            return 0
        try:
            for piece in self._pieces:
                assert piece.mirror is not None, "what is off the device has a copy on the host"
                self._device.allocate(piece.storage, piece.nbytes)
                piece.storage.copy_(piece.mirror)
            self._device.settle()
        except BaseException:
            self._empty()
            raise
        self._on_device = True
        self._drop_mirrors()
        return self._movable_bytes

    def release(self) -> int:
        freed_bytes = self.device_bytes + self.host_bytes
        self._empty()
        self._pieces, self._elsewhere_bytes = [], 0
        return freed_bytes

    def _empty(self) -> None:
        for piece in self._pieces:
            if piece.storage.nbytes():
                self._device.drop(piece.storage)
        self._device.settle()

    def _drop_mirrors(self) -> None:
        for piece in self._pieces:
            piece.mirror = None


def _pieces(tensors: Mapping[str, torch.Tensor]) -> list[_Piece]:
    """Tensors grouped by the storage they share; those without bytes of their own are left out."""
    pieces: dict[int, _Piece] = {}
    for path, tensor in tensors.items():
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            logger.warning("%s (%s) has no storage of its own and is not managed", path, tensor.layout)
            continue
        if tensor.device.type != "meta" and storage.nbytes():
            piece = pieces.setdefault(storage._cdata, _Piece(storage, {}, storage.nbytes()))
            piece.tensors[path] = tensor
    return list(pieces.values())


def _empty_storage(nbytes: int, device: torch.device | str = "cpu") -> torch.UntypedStorage:
    import torch

    return torch.UntypedStorage(nbytes, device=device)  # type: ignore[no-untyped-call]
