"""Makes each use of a tensor without its bytes raise `TensorAway`; shape, dtype and the like stay readable.

Three guards, from the clearest message to the widest coverage:

- *Tensor.* Each known tensor object gets a subclass of its class whose ``__torch_function__`` raises; identity,
  ``isinstance``, name and attributes stay. The original class returns with the bytes.
- *Storage object*, the result of ``tensor.untyped_storage()``: gets such a class as well.
- *Storage.* A flag in torch makes each access to the address raise, for all callers: views kept from a lease,
  TorchScript, autograd, DLPack, other threads. CUDA builds have a function to set it. Other builds have only the
  simulated card; the flag's position in memory is determined once, and used if a test proves it.

Not detected:

- an address that was taken before (a raw pointer, a consumer of DLPack, a captured graph): therefore `Weights` counts
  the holders of a storage before it drops the bytes;
- a kernel that is already running;
- a tensor class that does not allow assignment of ``__class__``: third guard only;
- another thread, while torch resizes a storage or copies to it;
- a consumer of DLPack that took a tensor before the load: the initial count includes it, like a TorchScript module. It
  is found only if it is a numpy array reachable from the engine (a variable of a Python module is not).

``type(tensor) is Parameter`` is False while the tensor is away. A storage that is also held outside its engine may have
a recall, which restores its bytes at the first use.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from operator import attrgetter, rshift, setitem
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import TensorAway
from ..sentences import Sentence

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

#: Attributes of a storage object: a weak reference to its `ManagedStorage`, for messages; its recall, if any; whether
#: it has been logged as held outside its engine.
MANAGED, RECALL, NAMED = "_residency_storage", "_residency_recall", "_residency_named"

#: Attributes of a tensor that do not access its bytes. Those that start with ``is_`` are added.
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
"""Maximal number of restores for one use of a tensor, if its engine is offloaded again after each."""

_address = attrgetter("_cdata")
#: Consumes an iterator.
_exhaust = deque[object](maxlen=0).extend

#: Guarded class by original class (None: cannot be guarded), and the reverse.
_absent: dict[type, type | None] = {}
_present: dict[type, type] = {}


def hide_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Makes each use of these tensors raise. Call before their bytes are dropped."""
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
                logger.debug("Tensors of type %s cannot be guarded individually", kind, exc_info=True)
                _absent[kind] = None


def show_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Undoes `hide_tensors`. Call once their bytes are restored."""
    for tensor in tensors:
        present = _present.get(type(tensor))
        if present is not None:
            tensor.__class__ = present


def close(storages: Iterable[torch.UntypedStorage], released: bool = False) -> None:
    """Makes each use of these storage objects raise. Call before `opened_one_by_one`, which sets the flags."""
    away = _storage_classes()[released]
    for storage in storages:
        storage.__class__ = away


def reopen(storages: Collection[torch.UntypedStorage]) -> None:
    """Undoes `close`. Call once the storages are filled."""
    import torch

    for storage in storages:
        storage.__class__ = torch.UntypedStorage
    _exhaust(_barrier().open(map(_address, storages)))


@contextmanager
def opened_one_by_one(addresses: list[int]) -> Iterator[Iterator[object]]:
    """Its value opens closed storages (``_cdata``), each until its next step: torch cannot resize a closed one.

    The storage objects stay closed; only `torch.UntypedStorage.resize_` and ``nbytes`` can be called on them.
    """
    barrier = _barrier()
    try:
        yield zip(barrier.close(chain(addresses[:1], addresses)), barrier.open(addresses), strict=False)
    except BaseException:
        _exhaust(barrier.close(addresses))
        raise


@contextmanager
def opened(storages: Collection[torch.UntypedStorage]) -> Iterator[None]:
    """Opens closed storages within the context, to fill them."""
    reopen(storages)
    try:
        yield
    finally:
        _exhaust(_barrier().close(map(_address, storages)))
        close(storages)


def recall(storage: torch.UntypedStorage) -> bool:
    """Restores the bytes of a storage that is also held outside its engine; returns False if that is impossible."""
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
    except Exception:  # a metaclass may raise anything
        logger.debug("Tensors of type %s cannot be guarded individually", kind, exc_info=True)
    _absent[kind] = absent
    return absent


def _answer(cls: type, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None) -> Any:
    import torch
    from torch.utils._pytree import tree_leaves

    options = options or {}
    allowed, describing = _harmless()
    if function in allowed or (function is torch.Tensor.type and len(arguments) == 1 and not options):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*arguments, **options)
    if function in describing:
        return _description(arguments[0])
    for tensor in tree_leaves((arguments, options)):
        for _ in range(_TRIES):  # its engine may be offloaded again at once
            if type(tensor) not in _present:
                break
            _bring_back(torch.Tensor.untyped_storage(tensor))
        else:  # offloaded again after each restore
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
    """Returns the functions that do not access the bytes, as in ``__torch_function__``, and those that describe."""
    import torch

    kind: Any = torch.Tensor
    flags = [name for name in dir(kind) if name.startswith("is_") and not callable(getattr(kind, name))]
    attributes = [getattr(kind, name) for name in (*_ATTRIBUTES, *flags) if hasattr(kind, name)]
    allowed = {attribute.__get__ for attribute in attributes}
    allowed |= {kind.requires_grad.__set__, kind.grad.__set__}
    allowed |= {getattr(where, name) for name in _METHODS for where in (kind, torch) if hasattr(where, name)}
    return frozenset(allowed), frozenset({kind.__repr__, kind.__format__})


@functools.cache
def _storage_classes() -> tuple[type, type]:
    """Returns the classes for storages that are away, and for released ones."""
    import torch

    def through(name: str) -> Callable[..., Any]:
        def method(self: Any, *arguments: Any, **options: Any) -> Any:
            _bring_back(self)
            return getattr(self, name)(*arguments, **options)  # now an UntypedStorage again

        return method

    def describe(self: Any) -> str:
        return f"UntypedStorage(<away>, path={_path(self)!r}, device='{self.device}')"

    guarded: dict[str, object] = {
        name: through(name)
        for name in dir(torch.UntypedStorage)
        if name not in _STORAGE and callable(getattr(torch.UntypedStorage, name))
    }
    guarded |= {"__slots__": (), "__repr__": describe, "__str__": describe}
    away = type("UntypedStorage", (torch.UntypedStorage,), guarded)
    return away, type("UntypedStorage", (away,), {"__slots__": ()})


class _Barrier(NamedTuple):
    """Functions that set and clear, on storages (``_cdata``), the flag that makes each access to the address raise.

    Their results are lazy: each step of the iterator treats one storage, without a Python call.
    """

    close: Callable[[Iterable[int]], Iterator[object]]
    open: Callable[[Iterable[int]], Iterator[object]]


@functools.cache
def _barrier() -> _Barrier:
    import torch

    text = str(TensorAway(_NAMELESS, False))
    try:
        set_error: Any = torch._C._set_storage_data_ptr_access_error_msg
        clear_error: Any = torch._C._clear_storage_data_ptr_access_error_msg
    except AttributeError:
        return _flags()
    return _Barrier(
        lambda addresses: map(set_error, addresses, repeat(text)), lambda addresses: map(clear_error, addresses)
    )


def _flags() -> _Barrier:
    """Returns the barrier for builds without these functions; writes the flags to memory, if a test proves it works."""
    import torch

    probe, other = torch.ones(4), torch.ones(4)
    storage, other_address = probe.untyped_storage(), other.untyped_storage()._cdata
    before = ctypes.string_at(storage._cdata, 96)
    torch._C._set_throw_on_mutable_data_ptr(probe)
    torch._C._set_warn_deprecated_on_mutable_data_ptr(probe)
    after = ctypes.string_at(storage._cdata, 96)
    changed = [place for place in range(96) if before[place] != after[place]]
    # Four flags in a row: has_mutable_data_ptr_check_, throw_on_mutable_data_ptr_, throw_on_immutable_data_ptr_ and
    # warn_deprecated_on_mutable_data_ptr_. The first and the third are set.
    first, closed = changed[0] if changed else 0, int.from_bytes(b"\1\0\1\0", sys.byteorder)
    # An array over the whole address space: an assignment takes a tenth of the time of a ctypes call.
    memory: Any = (ctypes.c_uint32 * (1 << 60)).from_address(first)

    def written(flags: int) -> Callable[[Iterable[int]], Iterator[object]]:
        return lambda addresses: map(setitem, repeat(memory), map(rshift, addresses, repeat(2)), repeat(flags))

    barrier = _Barrier(written(closed), written(0))
    if changed == [first, first + 1, first + 3] and before[first : first + 4] == b"\0\0\0\0":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _exhaust(barrier.close([other_address]))
            try:
                other.sum()
                proven = False
            except RuntimeError:
                proven = True
            _exhaust(barrier.open([other_address]))
        if proven and other.sum() == 4:
            return barrier
    logger.debug("This torch cannot guard storages: views kept from a lease are not guarded")
    return _Barrier(iter, iter)
