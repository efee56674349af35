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
that does not allow ``__class__`` to be assigned, which has the third guard only. An object that asks
``type(tensor) is Parameter`` while the tensor is away gets False. A consumer of DLPack that took a tensor of the engine
before the load is in that count from the start, as a TorchScript module is; it is only seen if it is an array of numpy
that hangs on the engine, so not in a variable of a Python module, and not if it is another library's.

A storage that others than the engine hold may have a recall, which brings its bytes back at the first use.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..errors import TensorAway

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

#: What hangs on a storage object: a weak reference to its `Piece`, for messages; its recall if it has one; and whether
#: the log has named it as held by others.
PIECE, RECALL, NAMED = "_residency_piece", "_residency_recall", "_residency_named"

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
    "__ne__", "__init__", "__repr__", "__str__", "__dir__", PIECE, RECALL, NAMED,
})  # fmt: skip

#: Absent class by the class that it stands for, and back; None for one that nothing can stand for.
_absent: dict[type, type | None] = {}
_present: dict[type, type] = {}


def hide(tensors: Iterable[torch.Tensor]) -> None:
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


def show(tensors: Iterable[torch.Tensor]) -> None:
    """Undo `hide`. Call it when their bytes are there."""
    for tensor in tensors:
        present = _present.get(type(tensor))
        if present is not None:
            tensor.__class__ = present


def close(storages: Iterable[torch.UntypedStorage], released: bool = False) -> None:
    """Make each access to these, which are empty, raise."""
    raise_from_now_on, away = _barrier()[0], _storage_classes()[released]
    for storage in storages:
        raise_from_now_on(storage._cdata)
        storage.__class__ = away


def reopen(storages: Iterable[torch.UntypedStorage]) -> None:
    """Undo `close`. Call it before they are filled."""
    import torch

    allow = _barrier()[1]
    for storage in storages:
        storage.__class__ = torch.UntypedStorage
        allow(storage._cdata)


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
        if type(tensor) in _present:
            storage = torch.Tensor.untyped_storage(tensor)
            _bring_back(storage)
            if type(tensor) in _present:  # its bytes are on their way
                raise TensorAway(_path(storage), False)
    return function(*arguments, **options)


def _bring_back(storage: torch.UntypedStorage) -> None:
    if not recall(storage) and isinstance(storage, _storage_classes()):
        raise TensorAway(_path(storage), type(storage) is _storage_classes()[True])


def _path(storage: torch.UntypedStorage) -> str:
    piece = getattr(storage, PIECE, lambda: None)()
    return "A tensor" if piece is None else str(piece.path)


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

    class Away(torch.UntypedStorage):
        __slots__ = ()

        def __getattribute__(self, name: str) -> Any:
            if name not in _STORAGE:
                _bring_back(self)
            return torch.UntypedStorage.__getattribute__(self, name)  # by now it may be one again

        def __repr__(self) -> str:
            return f"UntypedStorage(<away>, path={_path(self)!r}, device='{self.device}')"

        __str__ = __repr__

    def through(name: str) -> Callable[..., Any]:
        def method(self: Any, *arguments: Any) -> Any:
            _bring_back(self)
            return getattr(self, name)(*arguments)

        return method

    for name in ("__getitem__", "__setitem__", "__iter__", "__copy__", "__deepcopy__", "__reduce__", "__sizeof__"):
        setattr(Away, name, through(name))
    released = type("Released", (Away,), {"__slots__": ()})
    for kind in (Away, released):
        kind.__name__ = kind.__qualname__ = "UntypedStorage"
    return Away, released


@functools.cache
def _barrier() -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """Set and clear, on a storage (``_cdata``), the flag that makes each access to its address raise."""
    import torch

    text = str(TensorAway("a tensor", False))
    try:
        say: Any = torch._C._set_storage_data_ptr_access_error_msg
        clear: Any = torch._C._clear_storage_data_ptr_access_error_msg
    except AttributeError:
        return _flags()
    return lambda address: say(address, text), clear


def _flags() -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """The same without the functions for it: two flags beside those that torch lets one set, if they prove right."""
    import torch

    def nothing(address: int) -> None:
        pass

    def write(value: int) -> Callable[[int], None]:
        def flag(address: int) -> None:
            memory[address + first] = memory[address + first + 2] = value

        return flag

    # An array over all addresses: an assignment takes a tenth of the time of a call through ctypes.
    memory = (ctypes.c_ubyte * (1 << 62)).from_address(0)
    probe, other = torch.ones(4), torch.ones(4)
    storage = probe.untyped_storage()
    before = ctypes.string_at(storage._cdata, 96)
    torch._C._set_throw_on_mutable_data_ptr(probe)
    after = ctypes.string_at(storage._cdata, 96)
    changed = [place for place in range(96) if before[place] != after[place]]
    # has_mutable_data_ptr_check_, throw_on_mutable_data_ptr_ and then throw_on_immutable_data_ptr_.
    if len(changed) == 2 and changed[1] == changed[0] + 1 and before[changed[0] : changed[0] + 3] == b"\0\0\0":
        first = changed[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write(1)(other.untyped_storage()._cdata)
            try:
                other.sum()
                proven = False
            except RuntimeError:
                proven = True
            write(0)(other.untyped_storage()._cdata)
        if proven and other.sum() == 4:
            return write(1), write(0)
    logger.debug("This torch has no way to guard a storage; views that were kept from a lease are not guarded")
    return nothing, nothing
