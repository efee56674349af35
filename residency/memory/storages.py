"""The unique storages of an engine: the units that move, independent of the number of tensors over them."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..observability.error_classification import is_out_of_device_memory
from . import absent_tensors
from .object_graph import ByPath

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

BYTE_VIEW = "_residency_byte_view"
"""Marks the tensors through which moves access the bytes: they count as no holder's view, and are never hidden."""

ARRAYS = "_residency_arrays"
"""Attribute of a storage object: weak references to the numpy arrays that use its address."""

_FILL_CHECK_FROM_BYTES = 1 << 20
_FILL_CHECK_BYTES = 8 << 20


@dataclass(eq=False)
class ManagedStorage:
    """One unique storage and the tensors over it, by path.

    Attributes:
        nbytes: size of the storage while it is filled.
        key: identifies the storage (``_cdata``).
        byte_view: the storage as uint8 [nbytes]; valid while the storage is filled.
        constant: the bytes of the element that the storage repeats throughout, if it was found to; else None.
        other_tensors: known tensors over the storage that are not of the engine: they move with it.
        held_elsewhere: whether it is also held outside the engine, such as by a cache; see `Weights.bring_back`.
        stays_on_device: whether it stays on the device at an offload.
        fallback_copy: a separate copy in main memory, uint8 [nbytes], while there is no mirror.
    """

    storage: torch.UntypedStorage
    tensors: Mapping[str, torch.Tensor]
    nbytes: int
    key: int = field(init=False)
    byte_view: torch.Tensor = field(init=False)
    constant: bytes | None = None
    other_tensors: list[torch.Tensor] = field(default_factory=list)
    held_elsewhere: bool = False
    stays_on_device: bool = False
    fallback_copy: torch.Tensor | None = None
    #: Number of references from C++ to a tensor (``id``), such as by a TorchScript module.
    _in_cpp: dict[int, int] = field(default_factory=dict)
    #: Exported tensors, each with its earlier `_in_cpp`, and with a finalizer that keeps its old storage: DLPack keeps
    #: the tensor, and uses the address.
    _exports: list[tuple[torch.Tensor, int, weakref.finalize[..., Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._live_in(self.storage)
        if not all(map(is_alone, self.tensors.values())):
            self._in_cpp = _references_in_cpp(self._known())

    def _live_in(self, storage: torch.UntypedStorage) -> None:
        self.storage, self.key = storage, storage._cdata
        self.byte_view = as_bytes(storage, self.nbytes)
        setattr(self.byte_view, BYTE_VIEW, True)
        setattr(storage, absent_tensors.MANAGED, weakref.ref(self))

    @property
    def path(self) -> str:
        """A path to it from the engine; slow to compute."""
        return next(iter(self.tensors))

    def measure(self) -> None:
        """Records the current size of the storage."""
        self.nbytes = self.storage.nbytes()
        self._live_in(self.storage)

    def count_unknown_holders(self) -> int:
        """Returns the number of holders besides the engine and `other_tensors`: views, DLPack, C++."""
        import torch

        holders = torch._C._storage_Use_Count(self.key) - _own_references()
        if holders == len(self.tensors) and all(map(is_alone, self.tensors.values())):
            return 0
        known = self._known()
        return holders - len(known) + len(self._exported(known))

    def is_exported(self) -> bool:
        """Returns whether the address of the bytes may be in use outside Python, such as by DLPack."""
        return bool(self._exported(self._known()))

    def _known(self) -> dict[int, torch.Tensor]:
        known = {id(tensor): tensor for tensor in (*self.tensors.values(), *self.other_tensors)}
        for tensor in list(known.values()):
            base = tensor._base
            if base is not None and id(base) not in known:
                known[id(base)] = base
                self.other_tensors.append(base)
        return known

    def _exported(self, known: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """Returns the tensors with new references from C++: by DLPack, or by autograd for a possible backward pass."""
        taken = _references_in_cpp(known)
        return [
            tensor
            for key, tensor in known.items()
            if taken[key] > self._in_cpp.get(key, 0) and not tensor.requires_grad  # DLPack does not take those
        ]

    def forget_other_tensors(self) -> None:
        """Resets the count of holders; frees the old storages of exports that have ended."""
        self.other_tensors.clear()
        if self._exports:
            counts = _references_in_cpp({id(tensor): tensor for tensor, _, _ in self._exports})
            first: dict[int, int] = {}
            for tensor, before, _ in self._exports:
                first.setdefault(id(tensor), before)
            # Only when all exports of a tensor have ended: single ones cannot be distinguished.
            ended = [one for one in self._exports if counts[id(one[0])] <= first[id(one[0])]]
            self._exports = [one for one in self._exports if counts[id(one[0])] > first[id(one[0])]]
            for tensor, before, keeping in ended:
                self._in_cpp[id(tensor)] = min(before, self._in_cpp[id(tensor)])
                keeping.detach()

    def make_resizable(self, apart: bool = False) -> bool:
        """Moves the tensors to a storage that can be emptied and filled, if theirs cannot; returns False on failure.

        Bytes from a file (TorchScript, safetensors, mmap) or from numpy, or with a numpy array over them, cannot be
        resized: they are copied to a new storage of torch. ``apart`` and arrays (`ARRAYS`) force the copy for any
        storage: outside users keep the old one whole as long as they need it.
        """
        if self.byte_view.is_cpu and self.storage.is_shared():
            logger.warning("%s is shared with other processes and is not moved", ", ".join(self.tensors))
            return False
        known = vars(self.storage).get(ARRAYS)  # few of many storages have any
        arrays = [array for one in known if (array := one()) is not None] if known else []
        if self.storage.resizable() and not apart and not arrays:
            return True
        import torch  # not for each of many storages

        exported = self._exported(self._known())
        try:
            home = torch.UntypedStorage(self.nbytes, device=self.storage.device)  # type: ignore[no-untyped-call]
            home.copy_(self.storage)
            self._move_tensors_to(home)
        except RuntimeError as error:
            self._move_tensors_to(self.storage)
            logger.warning("%s cannot be moved: %s", ", ".join(self.tensors), error)
            return False
        for array in arrays:
            _keep_for(array, self.storage)
            logger.warning("%s: an array of numpy uses its %s bytes and keeps them", self.path, f"{self.nbytes:,}")
        for tensor in exported:
            self._exports.append((tensor, self._in_cpp.get(id(tensor), 0), _keep_for(tensor, self.storage)))
        self._in_cpp.update(_references_in_cpp({id(tensor): tensor for tensor in exported}))
        self._live_in(home)
        return True

    def find_constant(self) -> bytes | None:
        """Returns the element that the storage repeats, bit for bit, or None. Stops at the first block that differs.

        Skips small storages, which offer no gain. If the device has no room for the comparison, compares copies of the
        blocks in main memory.
        """
        if self.nbytes < _FILL_CHECK_FROM_BYTES:
            return None
        itemsize = next(iter(self.tensors.values())).element_size()
        width = _integers().get(itemsize)
        if width is None or self.nbytes % itemsize:
            return None
        elements = self.byte_view.view(width)
        first = elements[:1]
        step = 4096  # small at first: most weights differ at once
        start = 0
        while start < len(elements):
            if not _repeats(elements[start : start + step], first):
                return None
            start += step
            step = _FILL_CHECK_BYTES // itemsize
        return bytes(first.cpu().view(self.byte_view.dtype).tolist())

    def write_constant(self, target: torch.Tensor) -> None:
        """Fills ``target``, uint8 [nbytes], with `constant`."""
        import torch

        assert self.constant is not None
        width = _integers()[len(self.constant)]
        element = torch.frombuffer(bytearray(self.constant), dtype=width)
        target.view(width).fill_(element.item())

    def _move_tensors_to(self, storage: torch.UntypedStorage) -> None:
        import torch

        # inference_mode permits this for inference tensors and for leaves that require grad.
        with torch.inference_mode():
            for tensor in (*self.tensors.values(), *self.other_tensors):
                if tensor.untyped_storage()._cdata != storage._cdata:
                    tensor.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def managed_storages(tensors: Mapping[str, torch.Tensor]) -> list[ManagedStorage]:
    """Groups tensors by storage; omits tensors without bytes of their own."""
    storages = []
    for group in by_storage(tensors).values():
        storage = next(iter(group.values())).untyped_storage()
        storages.append(ManagedStorage(storage, group, storage.nbytes()))
    return storages


def by_storage(tensors: Mapping[str, torch.Tensor]) -> dict[int, Mapping[str, torch.Tensor]]:
    """Groups tensors by `storage_key`."""
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
    """Returns the same key for all tensors over the same bytes; None for a tensor without bytes of its own.

    These are sparse tensors, wrappers around other tensors, tensors on ``meta``, and fakes.
    """
    try:
        storage = tensor.untyped_storage()
        real = storage.nbytes() and storage.data_ptr()
    except Exception:  # subclasses may raise anything
        return None
    return storage._cdata if real else None


def _repeats(elements: torch.Tensor, first: torch.Tensor) -> bool:
    try:
        return bool((elements == first).all())
    except RuntimeError as error:
        if not is_out_of_device_memory(error):
            raise
    return bool((elements.cpu() == first.cpu()).all())


def as_bytes(storage: torch.UntypedStorage, nbytes: int) -> torch.Tensor:
    """Returns a storage as uint8 [nbytes]."""
    import torch

    device = storage.device
    if device.type == "cpu" and storage.nbytes() == nbytes:
        return torch.ByteTensor(storage)  # twice as fast; engines may have 100,000 storages
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (nbytes,), (1,))


def _keep_for(user: Any, storage: torch.UntypedStorage) -> weakref.finalize[..., Any]:
    """Keeps a storage alive, as an argument of a finalizer without effect, until ``user`` is freed."""
    keeping = weakref.finalize(user, lambda kept: None, storage)
    keeping.atexit = False
    return keeping


def _integers() -> dict[int, torch.dtype]:
    """Returns integer types by their size in bytes, to compare elements bit for bit."""
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hide_tensors(storages: Collection[ManagedStorage]) -> None:
    """Makes each use of the tensors raise; call before their bytes are dropped."""
    absent_tensors.hide_tensors(_tensors_over(storages))


def show_tensors(storages: Collection[ManagedStorage]) -> None:
    """Undoes `hide_tensors`; call once the bytes are restored."""
    absent_tensors.show_tensors(_tensors_over(storages))
    for managed in storages:
        if managed.other_tensors:
            managed.other_tensors.clear()


def _tensors_over(storages: Collection[ManagedStorage]) -> Iterator[torch.Tensor]:
    return chain(
        (tensor for managed in storages for tensor in managed.tensors.values()),
        (tensor for managed in storages if managed.other_tensors for tensor in managed.other_tensors),
    )


def forget_other_tensors(storages: Collection[ManagedStorage]) -> list[ManagedStorage]:
    """Resets the counts of holders; returns the storages that may have some outside the engine."""
    import torch

    for managed in storages:
        if managed.other_tensors or managed._exports:
            managed.forget_other_tensors()
    use_count, ours = torch._C._storage_Use_Count, _own_references()

    def is_crowded(managed: ManagedStorage) -> bool:
        tensors = managed.tensors.values()
        return use_count(managed.key) != ours + len(tensors) or not all(map(is_alone, tensors))

    return list(filter(is_crowded, storages))


def is_alone(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor has no references from C++."""
    return tensor._use_count() == 1  # type: ignore[attr-defined, no-any-return]


def _references_in_cpp(tensors: Mapping[int, torch.Tensor]) -> dict[int, int]:
    """Counts the references from C++ to each tensor (by ``id``), other than from views among them."""
    counts: dict[int, int] = {
        key: tensor._use_count() - 1  # type: ignore[attr-defined]
        for key, tensor in tensors.items()
    }
    for tensor in tensors.values():
        if id(tensor._base) in counts:
            counts[id(tensor._base)] -= 1
    return counts


@functools.cache
def _own_references() -> int:
    """Returns the number of references of a `ManagedStorage` itself to its storage."""
    import torch

    tensor = torch.empty(1)
    managed = ManagedStorage(tensor.untyped_storage(), {"": tensor}, 4)
    return torch._C._storage_Use_Count(managed.key) - len(managed.tensors)
