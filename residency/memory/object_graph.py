"""The object graph of an engine: kinds of objects, what each refers to, and paths to them (``.vad._model.weight``).

Paths are computed when a message or a proxy needs them; `discovery` walks faster, without paths.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import functools
import itertools
import logging
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from .self_moving import moves_of

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
#: How an object was reached: parent's trail, kind of step, step. Formatted for requested objects only.
_Trail = tuple[Any, str, Any]
_ROOT: _Trail = (None, "", "")


class ObjectKind(enum.Enum):
    """The treatment of a class's instances in a walk.

    Attributes:
        CLOSED: not entered: refers to nothing of the engine, or leads out into the rest of the process.
        OPEN: `gc.get_referents` returns exactly its contents, and its class.
        TENSOR, SESSION, GRAPH, ARRAY: objects to find; arrays are numpy's.
        SELF_MOVING: objects to find that free their GPU memory themselves; not entered.
        BY_NAME: entered by `children`, since the garbage collector shows too much or too little.
    """

    CLOSED = enum.auto()
    OPEN = enum.auto()
    TENSOR = enum.auto()
    SESSION = enum.auto()
    GRAPH = enum.auto()
    ARRAY = enum.auto()
    SELF_MOVING = enum.auto()
    BY_NAME = enum.auto()


#: Classes whose instances refer only to their own contents, or to nothing.
_TRANSPARENT = {
    object, int, float, complex, str, bytes, bytearray, list, dict, tuple, set, frozenset, BaseException,
    collections.deque, collections.OrderedDict, collections.defaultdict, functools.partial, types.SimpleNamespace,
    types.MethodType, types.BuiltinMethodType, types.CellType, types.MappingProxyType,
}  # fmt: skip
if sys.version_info >= (3, 11):  # before, they refer to a frame, which leads to all running code
    _TRANSPARENT |= {types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType}
#: Classes of plain values. Exact classes only, since subclasses may have attributes.
VALUES = frozenset({str, bytes, bytearray, int, float, complex, bool, type(None), type, types.ModuleType})
#: Classes that lead out of the engine into the rest of the process.
_EXITS = (type, types.ModuleType, logging.Logger, types.FrameType, types.TracebackType, types.CodeType)
_POINTER_BYTES = 8


def kind_of(cls: type) -> ObjectKind:
    """Returns the kind of a class's instances. Takes some microseconds: cache the result during a walk."""
    import torch

    # The attribute marks managers, whose other models do not belong to this engine.
    if cls in VALUES or issubclass(cls, _EXITS) or getattr(cls, "not_of_the_engine", False) is True:
        return ObjectKind.CLOSED
    if issubclass(cls, torch.Tensor):
        return ObjectKind.TENSOR
    if moves_of(cls) is not None:
        return ObjectKind.SELF_MOVING
    # By name, since onnxruntime need not be installed.
    if any(base.__name__ == "InferenceSession" and base.__module__.startswith("onnxruntime") for base in cls.__mro__):
        return ObjectKind.SESSION
    if issubclass(cls, torch.cuda.CUDAGraph):
        return ObjectKind.GRAPH
    if any(base.__module__ == "numpy" and base.__name__ == "ndarray" for base in cls.__mro__):
        return ObjectKind.ARRAY
    if issubclass(cls, torch.jit.ScriptModule) or not _is_transparent(cls):
        return ObjectKind.BY_NAME
    return ObjectKind.OPEN


def _is_transparent(cls: type) -> bool:
    """Returns whether instances have attributes, slots and the contents of a transparent class, but no C state."""
    while cls not in _TRANSPARENT:
        base: Any = cls.__base__
        names = sum(isinstance(value, types.MemberDescriptorType) for value in vars(cls).values())
        names += ("__dict__" in vars(cls)) + ("__weakref__" in vars(cls))
        if base is None or cls.__basicsize__ - base.__basicsize__ > names * _POINTER_BYTES:
            return False
        cls = base
    return True


class ByPath(Mapping[str, T]):
    """Objects by path, in the given order; ``values`` and ``len`` compute no paths and are cheap.

    ``names`` returns paths by ``id``; the path of other objects is their class and number.
    """

    __slots__ = ("_names", "_paths", "_things")

    def __init__(self, things: list[T], names: Callable[[Iterable[T]], Mapping[int, str]]) -> None:
        self._things = things
        self._names = names
        self._paths: dict[str, T] | None = None

    def values(self) -> list[T]:  # type: ignore[override]
        return self._things

    def only(self, things: list[T]) -> ByPath[T]:
        """Returns a mapping of other objects, or some of these, with the same ``names``."""
        return ByPath(things, self._names)

    def __len__(self) -> int:
        return len(self._things)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_path())

    def __getitem__(self, path: str) -> T:
        return self._by_path()[path]

    def _by_path(self) -> dict[str, T]:
        if self._paths is None:
            paths: dict[str, T] = {}
            names = self._names(self._things)
            for number, thing in enumerate(self._things, 1):
                paths[_free(names.get(id(thing), f"<{type(thing).__name__} {number}>"), paths)] = thing
            self._paths = paths
        return self._paths


class PathFinder:
    """Finds paths of objects by a step-by-step search of one engine: slow, for messages and `skip` only."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        #: Paths of the tensors seen in the last search, so that later calls for them need none.
        self._tensors: dict[int, tuple[weakref.ref[Any], str]] = {}

    def of(self, things: Iterable[Any], closed: Collection[int] = ()) -> dict[int, str]:
        """Returns paths by ``id``, as far as there are any. Objects in ``closed`` (``id``) are not entered."""
        things = list(things)
        known = {id(thing): self._tensors.get(id(thing)) for thing in things}
        if all((entry := known[id(thing)]) is not None and entry[0]() is thing for thing in things):
            return {key: entry[1] for key, entry in known.items() if entry is not None}
        return self._look_for({id(thing) for thing in things}, closed)

    def _look_for(self, wanted: set[int], closed: Collection[int]) -> dict[int, str]:
        paths: dict[int, str] = {}
        self._tensors.clear()
        for thing, trail, kind in visit(self._engine, closed):
            if kind is ObjectKind.TENSOR:
                self._tensors[id(thing)] = weakref.ref(thing), _path(trail)
            if id(thing) in wanted:
                paths[id(thing)] = _path(trail)
        return paths

    def at(self, path: str) -> list[Any]:
        """Returns the objects at a path; empty if there are none."""
        reached: list[Any] = []
        todo: list[tuple[Any, str]] = [(self._engine, "")]
        while todo:
            thing, here = todo.pop()
            if here == path:
                reached.append(thing)
            elif kind_of(type(thing)) is not ObjectKind.CLOSED:
                with contextlib.suppress(Exception):
                    steps = ((here + _step(how, step), child) for how, step, child in children(thing))
                    todo.extend((child, there) for there, child in steps if path.startswith(there))
        return reached


def visit(
    engine: Any, closed: Collection[int] = (), usable: Callable[[Any, str, Any], bool] = lambda *step: True
) -> Iterator[tuple[Any, _Trail, ObjectKind]]:
    """Yields every object of an engine once, with its trail, breadth first: slower than the walk of `discovery`.

    Objects in ``closed`` (``id``) are left out, and steps (object, how, step) that are not ``usable``.
    """
    seen: dict[int, Any] = {}
    kinds: dict[type, ObjectKind] = {}
    todo: deque[tuple[Any, _Trail]] = deque([(engine, _ROOT)])
    while todo:
        thing, trail = todo.popleft()
        kind = kinds.get(type(thing)) or kinds.setdefault(type(thing), kind_of(type(thing)))
        if kind is ObjectKind.CLOSED or id(thing) in seen or id(thing) in closed:
            continue
        seen[id(thing)] = thing  # kept alive, so that its id is not reused
        yield thing, trail, kind
        with contextlib.suppress(Exception):  # logged by the walk
            todo.extend(
                (child, (trail, how, step))
                for how, step, child in children(thing)
                if type(child) not in VALUES and id(child) not in seen and usable(thing, how, step)
            )


def children(thing: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields (how, step, child) for each object below this one; how: ``[]`` for an element, ``.`` for an attribute.

    No property, ``__getattr__`` or overridden method of the object runs.
    """
    import torch

    kind = type(thing)  # not isinstance, which uses a possibly overridden ``__class__``
    if issubclass(kind, torch.Tensor):
        yield from ((".", "grad", grad) for grad in gradients([thing]))
    if issubclass(kind, torch.jit.ScriptModule):
        yield from _script_tensors(thing)
    elif issubclass(kind, dict):
        yield from (("[]", key, value) for key, value in list(dict.items(thing)))
        yield from (("[]", f"key {index}", key) for index, key in enumerate(list(dict.keys(thing))))
    elif base := next((base for base in (list, tuple, set, frozenset, deque) if issubclass(kind, base)), None):
        yield from (("[]", index, value) for index, value in enumerate(list(base.__iter__(thing))))
    elif kind is types.MappingProxyType:
        yield from (("[]", key, value) for key, value in list(thing.items()))
    elif kind is types.MethodType:
        yield ".", "__self__", thing.__self__
        yield ".", "__func__", thing.__func__
    elif kind is types.BuiltinMethodType:
        yield ".", "__self__", thing.__self__
    elif kind is types.CellType:
        with contextlib.suppress(ValueError):  # an empty cell
            yield ".", "cell_contents", thing.cell_contents
    elif issubclass(kind, functools.partial):
        yield from ((".", name, getattr(thing, name)) for name in ("func", "args", "keywords"))
    elif kind is types.FunctionType:
        yield from ((".", name, getattr(thing, name)) for name in ("__defaults__", "__kwdefaults__", "__dict__"))
        for index, cell in enumerate(thing.__closure__ or ()):
            yield ".", f"__closure__[{index}]", cell
        return
    yield from ((".", name, value) for name, value in attributes(thing))


def gradients(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the existing gradients. Uses descriptors of the base class, since subclasses may override them."""
    import torch

    base: Any = torch._C.TensorBase
    is_leaf, grad = base.is_leaf.__get__, base.grad.__get__
    with torch._C.DisableTorchFunctionSubclass():
        return [found for tensor in tensors if is_leaf(tensor) and (found := grad(tensor)) is not None]


def has_constants(module: torch.jit.ScriptModule) -> bool:
    """Returns whether a TorchScript module has weights in its code, as after `torch.jit.freeze`."""
    for submodule in module.modules():
        code: Any = submodule._c
        for name in code._method_names():
            for node in code._get_method(name).graph.findAllNodes("prim::Constant"):
                if node.hasAttribute("value") and node.kindOf("value") == "t" and node.t("value").dim():
                    return True
    return False


def _script_tensors(module: Any) -> Iterator[tuple[str, Any, Any]]:
    # Parameters, buffers, and attributes of type Tensor are in C++, not in __dict__.
    yield from ((".", name, tensor) for name, tensor in module.named_parameters())
    yield from ((".", name, tensor) for name, tensor in module.named_buffers())
    for name, submodule in module.named_modules():
        kind = submodule.__dict__.get("_concrete_type")  # traced and frozen modules have none
        for attribute in kind.get_attributes() if kind is not None else ():
            with contextlib.suppress(AttributeError, RuntimeError):
                yield ".", f"{name}.{attribute}" if name else attribute, getattr(submodule, attribute)


def attributes(thing: Any, native: bool = True) -> Iterator[tuple[str, Any]]:
    """Yields the attributes in ``__dict__`` and slots; runs no property or ``__getattr__``.

    ``native``: also the members of types that are written in C.
    """
    with contextlib.suppress(AttributeError):
        yield from list(object.__getattribute__(thing, "__dict__").items())
    for base in type(thing).__mro__:
        for name, descriptor in _slots(base) if native or "__slots__" in vars(base) else ():
            with contextlib.suppress(AttributeError):
                yield name, descriptor.__get__(thing)


@functools.lru_cache(1024)
def _slots(cls: type) -> list[tuple[str, types.MemberDescriptorType]]:
    return [(name, value) for name, value in vars(cls).items() if isinstance(value, types.MemberDescriptorType)]


def steps_of(trail: _Trail) -> list[tuple[str, Any]]:
    """Returns (how, step) for each step of a trail, from the engine on; see `children`."""
    steps = []
    while trail is not _ROOT:
        trail, how, step = trail
        steps.append((how, step))
    return steps[::-1]


def _path(trail: _Trail) -> str:
    return "".join(itertools.starmap(_step, steps_of(trail)))


def _step(how: str, step: Any) -> str:
    return f"[{_readable(step)}]" if how == "[]" else f".{step}"


def _readable(key: Any) -> str:
    # Only for plain values: other classes' repr may run any code.
    return repr(key) if type(key) in VALUES else f"<{type(key).__name__}>"


def _free(path: str, taken: Collection[str]) -> str:
    unique = path
    for number in itertools.count(2):
        if unique not in taken:
            return unique
        unique = f"{path} ({number})"  # different keys may have the same text
    raise AssertionError("there is always a free number")
