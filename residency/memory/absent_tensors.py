"""While the bytes of a tensor are away, each use of it raises `TensorAway`; what it tells of itself stays readable.

Three guards, from the one with the best message to the one that sees most:

- *The tensors.* Each known tensor object gets a class whose ``__torch_function__`` raises: a subclass of its own,
  so that identity, ``isinstance``, name and attributes stay. The class is put back with the bytes.
- *The storage object*, which ``tensor.untyped_storage()`` returns, gets such a class as well.
- *The storage itself.* torch has a flag that makes each access to its address raise, whoever asks: views that were
  kept from a lease, TorchScript, autograd, DLPack, other threads. Builds with CUDA set it by a function; in builds
  without, which have only the simulated card, the flag is looked for once and used if it proves to do that.

What cannot be caught: an address that was taken before (a raw pointer, a consumer of DLPack, a captured graph), which
is why `Weights` counts the holders of a storage before it drops the bytes; a kernel that runs already; a tensor class
that does not allow ``__class__`` to be assigned, which has the third guard only; another thread, in the moment in which
torch resizes a storage or copies to it. An object that asks ``type(tensor) is Parameter`` while the tensor is away gets
False. A consumer of DLPack that took a tensor of the engine before the load is in that count from the start, as a
TorchScript module is; it is only seen if it is an array of numpy that hangs on the engine, so not in a variable of a
Python module, and not if it is another library's.

A storage that others than the engine hold may have a recall, which brings its bytes back at the first use.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import TensorAway
from ..sentences import Sentence

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

#: What hangs on a storage object: a weak reference to its `Piece`, for messages; its recall if it has one; and whether
#: the log has named it as held by others.
MANAGED, RECALL, NAMED = "_residency_storage", "_residency_recall", "_residency_named"

#: Attributes that tell of a tensor and do not touch its bytes. Those that start with ``is_`` are added.
_ATTRIBUTES = (
    "shape", "device", "dtype", "layout", "ndim", "requires_grad", "grad", "grad_fn", "names", "name", "nbytes",
    "itemsize", "output_nr", "retains_grad", "volatile", "grad_dtype", "_base", "_grad", "_grad_fn", "_version",
    "_cdata", "_backward_hooks", "_post_accumulate_grad_hooks", "_python_dispatch", "_has_symbolic_sizes_strides",
)  # fmt: skip
_METHODS = (
    "size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "storage_offset", "is_contiguous",
    "is_floating_point", "is_complex", "is_signed", "is_inference", "is_conj", "is_neg", "is_same_size", "is_set_to",
    "get_device", "has_names", "dim_order", "untyped_storage", "requires_grad_", "__len__", "__dir__",
)  # fmt: skip
_STORAGE = frozenset({
    "nbytes", "size", "__len__", "resizable", "device", "is_cuda", "is_hpu", "is_sparse", "is_sparse_csr", "_cdata",
    "get_device", "element_size", "untyped", "__class__", "__dict__", "__doc__", "__module__", "__hash__", "__eq__",
    "__ne__", "__init__", "__repr__", "__str__", "__dir__", "__new__", "__init_subclass__", "__subclasshook__",
    "__getattribute__", "__setattr__", "__delattr__", "_fake_device", "_checkpoint_offset",
})  # fmt: skip

_NAMELESS = Sentence("A tensor", "某个张量")

_TRIES = 10
"""How often a tensor is brought back for one use of it, while its engine leaves again and again."""

#: Absent class by the class that it stands for, and back; None for one that nothing can stand for.
_absent: dict[type, type | None] = {}
_present: dict[type, type] = {}


def hide_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Make each use of these raise. Call it before their bytes go."""
    for tensor in tensors:
        kind = type(tensor)
        try:
            absent = _absent[kind]
        except KeyError:
            absent = _stand_in(kind)
        if absent is not None:
            try:
                tensor.__class__ = absent
            except TypeError:
                logger.debug("Tensors of type %s cannot be guarded one by one", kind, exc_info=True)
                _absent[kind] = None


def show_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Undo `hide_tensors`. Call it when their bytes are there."""
    for tensor in tensors:
        present = _present.get(type(tensor))
        if present is not None:
            tensor.__class__ = present


def close(storages: Iterable[torch.UntypedStorage], released: bool = False) -> None:
    """Make each use of these storage objects raise. Call it before the bytes go; `opened_one_by_one` does the rest."""
    away = _storage_classes()[released]
    for storage in storages:
        storage.__class__ = away


def reopen(storages: Collection[torch.UntypedStorage]) -> None:
    """Undo `close`. Call it when they are filled."""
    import torch

    for storage in storages:
        storage.__class__ = torch.UntypedStorage
    _barrier().open([storage._cdata for storage in storages])


def opened_one_by_one(addresses: Iterable[int]) -> Iterator[None]:
    """Open closed storages (``_cdata``) in turn, each until the next step: torch resizes none that is closed.

    The storage objects stay closed; `torch.UntypedStorage.resize_` and ``nbytes`` can be called on them.
    """
    return _barrier().one_by_one(addresses)


@contextmanager
def opened(storages: Collection[torch.UntypedStorage]) -> Iterator[None]:
    """Open closed storages for a moment, to fill them."""
    reopen(storages)
    try:
        yield
    finally:
        _barrier().close([storage._cdata for storage in storages])
        close(storages)


def recall(storage: torch.UntypedStorage) -> bool:
    """Bring the bytes of a storage back, if others than an engine hold it; False if they cannot be brought back."""
    back: Callable[[torch.UntypedStorage], bool] | None = getattr(storage, RECALL, None)
    return back is not None and back(storage)


def _stand_in(kind: type) -> type | None:
    absent: type | None = None
    try:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        guard = {"__slots__": (), "__torch_function__": classmethod(_answer), "__dlpack_c_exchange_api__": None}
        absent = type(kind)(kind.__name__, (kind,), {**names, **guard})
        _present[absent] = kind
        _absent[absent] = None
    except Exception:  # others' metaclasses are others' code
        logger.debug("Tensors of type %s cannot be guarded one by one", kind, exc_info=True)
    _absent[kind] = absent
    return absent


def _answer(cls: type, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None) -> Any:
    import torch
    from torch.utils._pytree import tree_leaves

    options = options or {}
    tells, describes = _harmless()
    if function in tells or (function is torch.Tensor.type and len(arguments) == 1 and not options):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*arguments, **options)
    if function in describes:
        return _description(arguments[0])
    for tensor in tree_leaves((arguments, options)):
        for _ in range(_TRIES):  # it may leave again at once
            if type(tensor) not in _present:
                break
            _bring_back(torch.Tensor.untyped_storage(tensor))
        else:  # its bytes are on their way
            raise TensorAway(_path(torch.Tensor.untyped_storage(tensor)), False)
    return function(*arguments, **options)


def _bring_back(storage: torch.UntypedStorage) -> None:
    if not recall(storage) and isinstance(storage, _storage_classes()):
        raise TensorAway(_path(storage), type(storage) is _storage_classes()[True])


def _path(storage: torch.UntypedStorage) -> str:
    managed = getattr(storage, MANAGED, lambda: None)()
    return _NAMELESS if managed is None else str(managed.path)


def _description(tensor: torch.Tensor) -> str:
    path = _path(tensor.untyped_storage())
    return f"tensor(<away>, path={path!r}, shape={tuple(tensor.shape)}, dtype={tensor.dtype}, device='{tensor.device}')"


@functools.cache
def _harmless() -> tuple[frozenset[Any], frozenset[Any]]:
    """Functions that do not touch the bytes, as ``__torch_function__`` is given them, and those that describe."""
    import torch

    kind: Any = torch.Tensor
    flags = [name for name in dir(kind) if name.startswith("is_") and not callable(getattr(kind, name))]
    attributes = [getattr(kind, name) for name in (*_ATTRIBUTES, *flags) if hasattr(kind, name)]
    tells = {attribute.__get__ for attribute in attributes}
    tells |= {kind.requires_grad.__set__, kind.grad.__set__}
    tells |= {getattr(where, name) for name in _METHODS for where in (kind, torch) if hasattr(where, name)}
    return frozenset(tells), frozenset({kind.__repr__, kind.__format__})


@functools.cache
def _storage_classes() -> tuple[type, type]:
    """For storages that are away and come back, and for those that were released."""
    import torch

    def through(name: str) -> Callable[..., Any]:
        def method(self: Any, *arguments: Any, **options: Any) -> Any:
            _bring_back(self)
            return getattr(self, name)(*arguments, **options)  # by now it is one again

        return method

    def describe(self: Any) -> str:
        return f"UntypedStorage(<away>, path={_path(self)!r}, device='{self.device}')"

    guarded = {
        name: through(name)
        for name in dir(torch.UntypedStorage)
        if name not in _STORAGE and callable(getattr(torch.UntypedStorage, name))
    }
    Away = type(
        "Away", (torch.UntypedStorage,), {**guarded, "__slots__": (), "__repr__": describe, "__str__": describe}
    )
    released = type("Released", (Away,), {"__slots__": ()})
    for kind in (Away, released):
        kind.__name__ = kind.__qualname__ = "UntypedStorage"
    return Away, released


class _Barrier(NamedTuple):
    """Sets and clears, on storages (``_cdata``), the flag that makes each access to its address raise."""

    close: Callable[[Iterable[int]], None]
    open: Callable[[Iterable[int]], None]
    #: Opens each in turn until the next step.
    one_by_one: Callable[[Iterable[int]], Iterator[None]]


@functools.cache
def _barrier() -> _Barrier:
    import torch

    text = str(TensorAway(_NAMELESS, False))
    try:
        localize: Any = torch._C._set_storage_data_ptr_access_error_msg
        clear: Any = torch._C._clear_storage_data_ptr_access_error_msg
    except AttributeError:
        return _flags()

    def close(addresses: Iterable[int]) -> None:
        for address in addresses:
            localize(address, text)

    def open_(addresses: Iterable[int]) -> None:
        for address in addresses:
            clear(address)

    def one_by_one(addresses: Iterable[int]) -> Iterator[None]:
        for address in addresses:
            clear(address)
            try:
                yield
            finally:
                localize(address, text)

    return _Barrier(close, open_, one_by_one)


def _flags() -> _Barrier:
    """The same without the functions for it: two flags beside those that torch lets one set, if they prove right."""
    import torch

    probe, other = torch.ones(4), torch.ones(4)
    storage = probe.untyped_storage()
    before = ctypes.string_at(storage._cdata, 96)
    torch._C._set_throw_on_mutable_data_ptr(probe)
    torch._C._set_warn_deprecated_on_mutable_data_ptr(probe)
    after = ctypes.string_at(storage._cdata, 96)
    changed = [place for place in range(96) if before[place] != after[place]]
    # Four flags in a row: has_mutable_data_ptr_check_, throw_on_mutable_data_ptr_, throw_on_immutable_data_ptr_ and
    # warn_deprecated_on_mutable_data_ptr_. The first and the third are set.
    first, closed = changed[0] if changed else 0, int.from_bytes(b"\1\0\1\0", sys.byteorder)
    # An array over all addresses: an assignment takes a tenth of the time of a call through ctypes.
    memory = (ctypes.c_uint32 * (1 << 60)).from_address(first)

    def close(addresses: Iterable[int]) -> None:
        for address in addresses:
            memory[address >> 2] = closed

    def open_(addresses: Iterable[int]) -> None:
        for address in addresses:
            memory[address >> 2] = 0

    def one_by_one(addresses: Iterable[int]) -> Iterator[None]:
        for address in addresses:
            memory[address >> 2] = 0
            try:
                yield
            finally:
                memory[address >> 2] = closed

    if changed == [first, first + 1, first + 3] and before[first : first + 4] == b"\0\0\0\0":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            close([other.untyped_storage()._cdata])
            try:
                other.sum()
                proven = False
            except RuntimeError:
                proven = True
            open_([other.untyped_storage()._cdata])
        if proven and other.sum() == 4:
            return _Barrier(close, open_, one_by_one)
    logger.debug("This torch has no way to guard a storage; views that were kept from a lease are not guarded")
    return _Barrier(lambda addresses: None, lambda addresses: None, lambda addresses: iter([None for _ in addresses]))
