"""Deep copies of an engine's results, with a `Part` for each object that cannot be copied."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import (
    AsyncGenerator,
    Callable,
    Coroutine,
    Generator,
    Hashable,
    ItemsView,
    Iterator,
    KeysView,
    ValuesView,
)
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType

from ..errors import NotHandedOut
from ..memory.object_graph import attributes
from ..modules import imported
from .part_proxy import Held, Part, find_paths

if TYPE_CHECKING:
    import torch

_VALUES = frozenset({str, bytes, int, float, complex, bool, type(None), type(...), type(NotImplemented)})
_PLAIN = (dict, list, set, frozenset, tuple)
_BOUND = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)
#: Copied by attributes.
_RECORDS = (BaseException, types.SimpleNamespace, UserDict, UserList)
#: Iterators of these modules are implemented in C and do not expose their source.
_OPAQUE = ("builtins", "itertools", "numpy")


class HandOut:
    """Deep copy of one result. Use an instance once, under the lease that produced the result.

    Tensors for which ``holds_tensor`` is true are cloned without their graph; arrays and memoryviews are copied;
    containers and dataclasses are rebuilt without their constructors. Repeated objects, cycles and equal views of one
    storage are preserved. Any other object in which ``holds_memory`` finds tensors or sessions becomes a `Part`, with
    its path in the engine or, if unreachable, with the object itself (`Held`). Raises `NotHandedOut` for iterators,
    coroutines, weak references and capsules.
    """

    def __init__(
        self,
        keeper: Any,
        engine: Any,
        holds_tensor: Callable[[torch.Tensor], bool],
        holds_memory: Callable[[Any], bool],
    ) -> None:
        self._keeper = keeper
        self._engine = engine
        self._holds_tensor = holds_tensor
        self._holds_memory = holds_memory
        self._memo: dict[int, tuple[Any, Any]] = {}  # references the originals, so that no id is reused
        self._views: dict[Any, torch.Tensor] = {}
        self._parts: list[tuple[Part, Any]] = []

    def __call__(self, answer: Any) -> Any:
        copy = self._copy(answer)
        if self._parts:
            owners = {id(owner): owner for _, thing in self._parts for owner in [_owner(thing)]}
            paths = find_paths(self._engine, owners)
            for part, thing in self._parts:
                path = paths.get(id(_owner(thing)))
                if path is None:
                    path = (Held(thing, self._engine),)
                elif is_bound(thing):
                    path = (*path, thing.__name__)
                object.__setattr__(part, "_path", path)
        return copy

    def _copy(self, thing: Any) -> Any:
        if type(thing) in _VALUES or isinstance(thing, (type, types.ModuleType, Part)):
            return thing
        if id(thing) in self._memo:
            return self._memo[id(thing)][1]
        copy = self._new(thing)
        # A tuple in a cycle was already copied by the recursion.
        return self._memo.setdefault(id(thing), (thing, copy))[1]

    def _new(self, thing: Any) -> Any:
        import torch
        from torch.utils._pytree import SUPPORTED_NODES

        kind = type(thing)
        if kind in _PLAIN and _only_values(thing):
            return kind(thing)
        if isinstance(thing, torch.Tensor):
            return self._tensor(thing)
        if isinstance(thing, (torch.UntypedStorage, torch.TypedStorage)):
            return thing.clone()  # type: ignore[no-untyped-call]
        if isinstance(thing, torch.nn.Module):
            return self._part(thing)
        if isinstance(thing, dict):
            return self._mapping(thing)
        if isinstance(thing, (list, deque)):
            return self._sequence(thing)
        if isinstance(thing, (tuple, set, frozenset)):
            return self._again(thing)
        if kind is types.MappingProxyType:
            return types.MappingProxyType(self._copy(dict(thing)))
        if isinstance(thing, ItemsView):
            return self._copy(dict(thing)).items()
        if isinstance(thing, ValuesView):
            return self._copy(dict(enumerate(thing))).values()
        if isinstance(thing, KeysView):
            return self._copy(dict.fromkeys(thing)).keys()
        if kind is memoryview:
            return _copied_view(thing)
        if (numpy := imported("numpy")) and isinstance(thing, numpy.ndarray):
            return self._array(thing)
        if isinstance(thing, Coroutine):
            thing.close()
        if is_stream(thing) or isinstance(thing, (AsyncGenerator, Coroutine)) or self._is_live_reference(thing):
            raise NotHandedOut(kind.__name__)
        if isinstance(thing, functools.partial):
            return kind(self._copy(thing.func), *self._copy(thing.args), **self._copy(thing.keywords))
        if is_dataclass(thing) or isinstance(thing, _RECORDS):
            return self._record(thing)
        if kind in SUPPORTED_NODES:
            children, context = SUPPORTED_NODES[kind].flatten_fn(thing)
            return SUPPORTED_NODES[kind].unflatten_fn([self._copy(child) for child in children], context)
        return self._part(thing) if self._holds_memory(_owner(thing)) else thing

    def _part(self, thing: Any) -> Part:
        part = Part(self._keeper, ())
        self._parts.append((part, thing))
        return part

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        if not self._holds_tensor(tensor):
            # The autograd graph would keep the weights alive.
            return tensor if tensor.grad_fn is None else tensor.detach()
        simple = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
        if not simple or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            copy = tensor.detach().clone()
            # A subclass may have tensors as attributes.
            return self._with_attributes(copy, tensor) if type(copy) is type(tensor) else copy
        view = view_of(tensor)
        if view in self._views:
            return self._views[view].detach()
        copy = self._views[view] = tensor.detach().clone()
        return copy

    def _array(self, array: Any) -> Any:
        copy = array.copy()
        if array.dtype.hasobject:
            if array.dtype.names:
                raise NotHandedOut(f"array of {array.dtype}")
            self._memo[id(array)] = array, copy
            for index in range(array.size):  # one by one: assigning a list would spread its items
                copy.reshape(-1)[index] = self._copy(array.flat[index])
        return copy

    def _mapping(self, mapping: Any) -> Any:
        kind: Any = next(base for base in (OrderedDict, defaultdict, dict) if isinstance(mapping, base))
        copy = kind.__new__(type(mapping))
        self._memo[id(mapping)] = mapping, copy
        if kind is defaultdict:
            copy.default_factory = self._copy(mapping.default_factory)
        for key, value in kind.items(mapping):
            kind.__setitem__(copy, self._copy(key), self._copy(value))
        return self._with_attributes(copy, mapping)

    def _sequence(self, sequence: Any) -> Any:
        base: Any = list if isinstance(sequence, list) else deque
        copy = base.__new__(type(sequence))
        if base is deque:
            deque.__init__(copy, (), sequence.maxlen)
        self._memo[id(sequence)] = sequence, copy
        base.extend(copy, [self._copy(item) for item in base.__iter__(sequence)])
        return self._with_attributes(copy, sequence)

    def _again(self, thing: Any) -> Any:
        """Copies a tuple or set to the same type. Some types, such as torch.return_types, need a call of the type."""
        base: Any = next(base for base in (tuple, set, frozenset) if isinstance(thing, base))
        kind, items = type(thing), [self._copy(item) for item in base.__iter__(thing)]
        if base is set:
            copy = set.__new__(kind)
            copy.update(items)
        else:
            try:
                copy = base.__new__(kind, items)
            except TypeError:
                copy = kind(items)
        return self._with_attributes(copy, thing)

    def _record(self, record: Any) -> Any:
        """Copies attributes; of an exception also the arguments, but not the traceback, which has live objects."""
        kind: Any = type(record)
        if isinstance(record, BaseException):
            copy = kind.__new__(kind, *self._copy(record.args))
        else:
            copy = (types.SimpleNamespace if isinstance(record, types.SimpleNamespace) else object).__new__(kind)
        self._memo[id(record)] = record, copy
        return self._with_attributes(copy, record)

    def _with_attributes(self, copy: Any, thing: Any) -> Any:
        for name, value in attributes(thing, native=False):
            object.__setattr__(copy, name, self._copy(value))  # bypasses frozen classes and __setattr__
        return copy

    def _is_live_reference(self, thing: Any) -> bool:
        if isinstance(thing, ReferenceType):
            return thing() is not None and self._holds_memory(thing())
        return type(thing).__name__ == "PyCapsule"


def view_of(tensor: torch.Tensor) -> Hashable:
    """Returns the same for tensors that are equal views of one storage. The storage must live as long as the result."""
    where = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()
    return *where, tensor.dtype, tensor.is_conj(), tensor.is_neg()


def is_stream(answer: Any) -> bool:
    """Returns true for generators and opaque iterators; their items are copied one by one under a continuing lease."""
    return isinstance(answer, Generator) or (isinstance(answer, Iterator) and type(answer).__module__ in _OPAQUE)


def is_bound(thing: Any) -> bool:
    """Returns true for bound methods, also of types implemented in C (``caches.get``)."""
    return _owner(thing) is not thing


def _owner(thing: Any) -> Any:
    owner = thing.__self__ if isinstance(thing, _BOUND) else None
    return thing if owner is None or isinstance(owner, types.ModuleType) else owner


def _copied_view(view: memoryview) -> memoryview:
    copy = memoryview(bytearray(view.tobytes()))
    if view.ndim == 1 and view.format == "B":
        return copy
    try:
        return copy.cast(view.format, view.shape or ())  # type: ignore[call-overload,no-any-return]
    except ValueError:
        raise NotHandedOut(f"memoryview of format {view.format!r}") from None


def _only_values(container: Any) -> bool:
    """Returns true for containers of plain values, such as vocabularies, which need no deep copy."""
    values = container.values() if type(container) is dict else ()
    return _VALUES.issuperset(map(type, container)) and _VALUES.issuperset(map(type, values))
