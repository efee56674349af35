"""The unique storages of an engine: what really moves, whatever number of tensors looks at it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..diagnosis import is_out_of_device_memory
from .paths import ByPath

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_FILL_CHECK_FROM_BYTES = 1 << 20
_FILL_CHECK_BYTES = 8 << 20


@dataclass(eq=False)
class Piece:
    """One unique storage and the tensors over it, by path.

    Attributes:
        nbytes: of the storage while it is filled.
        raw: the storage as uint8 [nbytes]; valid whenever the storage is filled.
        fill: the bytes that the storage repeats from end to end, if it was found to; else None.
    """

    storage: torch.UntypedStorage
    tensors: Mapping[str, torch.Tensor]
    nbytes: int
    raw: torch.Tensor = field(init=False)
    fill: bytes | None = None

    def __post_init__(self) -> None:
        self.raw = _as_bytes(self.storage, self.nbytes)

    def measure(self) -> None:
        """Take the storage's present size for the right one."""
        self.nbytes = self.storage.nbytes()
        self.raw = _as_bytes(self.storage, self.nbytes)

    @property
    def itemsize(self) -> int:
        return next(iter(self.tensors.values())).element_size()

    def make_resizable(self) -> bool:
        """Give the tensors a storage that can be emptied and filled, if theirs cannot; False if they refuse.

        Bytes that came from a file (TorchScript, safetensors, mmap) or from numpy, or that numpy looks at, belong
        to somebody else and cannot be resized: they are copied into a storage of torch's own.
        """
        if self.raw.is_cpu and self.storage.is_shared():
            logger.warning("%s is shared with other processes and stays where it is", ", ".join(self.tensors))
            return False
        if self.storage.resizable():
            return True
        home = _new_storage(self.nbytes, self.storage.device)
        home.copy_(self.storage)
        try:
            self._move_tensors_to(home)
        except RuntimeError as error:
            self._move_tensors_to(self.storage)
            logger.warning("%s cannot be moved and stays where it is: %s", ", ".join(self.tensors), error)
            return False
        self.storage = home
        self.raw = _as_bytes(home, self.nbytes)
        return True

    def find_fill(self) -> bytes | None:
        """The element that the storage repeats, bit for bit, or None. Looks in pieces and stops at a difference.

        Small storages are not looked at: there is nothing to gain. On a device that has no room for the comparison it
        is made in main memory, over a copy of each part.
        """
        import torch

        if self.nbytes < _FILL_CHECK_FROM_BYTES:
            return None
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(self.itemsize)
        if width is None or self.nbytes % self.itemsize:
            return None
        elements = self.raw.view(width)
        first = elements[:1]
        step = 4096  # most weights differ at once; then look in larger pieces
        start = 0
        while start < len(elements):
            if not _repeats(elements[start : start + step], first):
                return None
            start += step
            step = _FILL_CHECK_BYTES // self.itemsize
        return bytes(first.cpu().view(torch.uint8).tolist())

    def refill(self) -> None:
        """Write `fill` from end to end."""
        import torch

        assert self.fill is not None
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[len(self.fill)]
        element = torch.frombuffer(bytearray(self.fill), dtype=width)
        self.raw.view(width).fill_(element.item())

    def _move_tensors_to(self, storage: torch.UntypedStorage) -> None:
        import torch

        # inference_mode, so that inference tensors and leaves that require grad may be given a storage alike.
        with torch.inference_mode():
            for tensor in self.tensors.values():
                if tensor.untyped_storage()._cdata != storage._cdata:
                    tensor.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def pieces_of(tensors: Mapping[str, torch.Tensor]) -> list[Piece]:
    """Tensors grouped by the storage they share; those without bytes of their own are left out."""
    pieces = []
    for group in by_storage(tensors).values():
        storage = next(iter(group.values())).untyped_storage()
        pieces.append(Piece(storage, group, storage.nbytes()))
    return pieces


def by_storage(tensors: Mapping[str, torch.Tensor]) -> dict[int, Mapping[str, torch.Tensor]]:
    """Tensors by what `storage_key` says of them."""
    if isinstance(tensors, ByPath):
        groups: dict[int, list[torch.Tensor]] = {}
        for tensor in tensors.values():
            key = storage_key(tensor)
            if key is not None:
                groups.setdefault(key, []).append(tensor)
        return {key: tensors.only(group) for key, group in groups.items()}
    named: dict[int, dict[str, torch.Tensor]] = {}
    for path, tensor in tensors.items():
        key = storage_key(tensor)
        if key is not None:
            named.setdefault(key, {})[path] = tensor
    return dict(named)


def storage_key(tensor: torch.Tensor) -> int | None:
    """What two tensors over the same bytes have in common; None for those that have no bytes of their own.

    Sparse tensors, wrappers around other tensors, those on ``meta`` and fakes have none.
    """
    try:
        storage = tensor.untyped_storage()
        real = storage.nbytes() and storage.data_ptr()
    except Exception:  # subclasses answer as they like
        return None
    return storage._cdata if real else None


def _repeats(elements: torch.Tensor, first: torch.Tensor) -> bool:
    try:
        return bool((elements == first).all())
    except RuntimeError as error:
        if not is_out_of_device_memory(error):
            raise
    return bool((elements.cpu() == first.cpu()).all())


def _as_bytes(storage: torch.UntypedStorage, nbytes: int) -> torch.Tensor:
    import torch

    device = storage.device
    if device.type == "cpu" and storage.nbytes() == nbytes:
        return torch.ByteTensor(storage)  # twice as fast, and engines may have 100,000 of them
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (nbytes,), (1,))


def _new_storage(nbytes: int, device: torch.device) -> torch.UntypedStorage:
    import torch

    return torch.UntypedStorage(nbytes, device=device)  # type: ignore[no-untyped-call]
