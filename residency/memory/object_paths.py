"""Paths that lead from an engine to what hangs on it (``.vad._model.weight``), found when a message needs them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from .object_kinds import VALUES, ObjectKind, kind_of

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
#: How a thing was reached: from where, and by which step. Put into words only for what is asked for.
_Trail = tuple[Any, str, Any]
_ROOT: _Trail = (None, "", "")


class ByPath(Mapping[str, T]):
    """Things by path, in the order given; ``values`` and ``len`` need no path and are cheap.

    ``names`` gives paths for some things by their ``id``; one without a path gets its class and number.
    """

    __slots__ = ("_names", "_paths", "_things")

    def __init__(self, things: list[T], names: Callable[[Iterable[T]], Mapping[int, str]]) -> None:
        self._things = things
        self._names = names
        self._paths: dict[str, T] | None = None

    def values(self) -> list[T]:  # type: ignore[override]
        return self._things

    def only(self, things: list[T]) -> ByPath[T]:
        """Others, or some of these, that are named in the same way."""
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
    """Finds the paths of what hangs on one engine, step by step: slow, for messages and `skip` only."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        #: Paths of the tensors that were seen when one was last looked for, so that the next one is found at once.
        self._tensors: dict[int, tuple[weakref.ref[Any], str]] = {}

    def of(self, things: Iterable[Any], closed: Collection[int] = ()) -> dict[int, str]:
        """Paths by ``id``, as far as there are any. Things in ``closed`` (``id``) are not entered."""
        things = list(things)
        known = {id(thing): self._tensors.get(id(thing)) for thing in things}
        if all((entry := known[id(thing)]) is not None and entry[0]() is thing for thing in things):
            return {key: entry[1] for key, entry in known.items() if entry is not None}
        return self._look_for({id(thing) for thing in things}, closed)

    def _look_for(self, wanted: set[int], closed: Collection[int]) -> dict[int, str]:
        paths: dict[int, str] = {}
        seen: dict[int, Any] = {}
        kinds: dict[type, ObjectKind] = {}
        todo: deque[tuple[Any, _Trail]] = deque([(self._engine, _ROOT)])
        self._tensors.clear()
        while todo:
            thing, trail = todo.popleft()
            kind = kinds.get(type(thing)) or kinds.setdefault(type(thing), kind_of(type(thing)))
            if kind is ObjectKind.CLOSED or id(thing) in seen or id(thing) in closed:
                continue
            seen[id(thing)] = thing  # kept, so that no other object takes this id meanwhile
            if kind is ObjectKind.TENSOR:
                self._tensors[id(thing)] = weakref.ref(thing), _path(trail)
            if id(thing) in wanted:
                paths[id(thing)] = _path(trail)
            with contextlib.suppress(Exception):  # the walk has told of it
                todo.extend(
                    (child, (trail, how, step))
                    for how, step, child in children(thing)
                    if type(child) not in VALUES and id(child) not in seen
                )
        return paths

    def at(self, path: str) -> list[Any]:
        """What hangs on a path; nothing if it leads nowhere."""
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


def children(thing: Any) -> Iterator[tuple[str, Any, Any]]:
    """What hangs on a thing: (how, step, child); how is ``[]`` for an element and ``.`` for an attribute.

    No property, ``__getattr__`` or overridden method of the thing runs.
    """
    import torch

    kind = type(thing)  # not isinstance, which believes what an object says of its class
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
        with contextlib.suppress(ValueError):  # a cell that was never filled
            yield ".", "cell_contents", thing.cell_contents
    elif issubclass(kind, functools.partial):
        yield from ((".", name, getattr(thing, name)) for name in ("func", "args", "keywords"))
    elif kind is types.FunctionType:
        yield from ((".", name, getattr(thing, name)) for name in ("__defaults__", "__kwdefaults__", "__dict__"))
        for index, cell in enumerate(thing.__closure__ or ()):
            yield ".", f"__closure__[{index}]", cell
        return
    yield from _attributes(thing)


def gradients(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Of those that have one. By the base's descriptors, since a subclass may answer as it likes."""
    import torch

    base: Any = torch._C.TensorBase
    is_leaf, grad = base.is_leaf.__get__, base.grad.__get__
    with torch._C.DisableTorchFunctionSubclass():
        return [found for tensor in tensors if is_leaf(tensor) and (found := grad(tensor)) is not None]


def has_constants(module: torch.jit.ScriptModule) -> bool:
    """Whether weights have become part of a TorchScript module's code, as `torch.jit.freeze` makes them."""
    for submodule in module.modules():
        code: Any = submodule._c
        for name in code._method_names():
            for node in code._get_method(name).graph.findAllNodes("prim::Constant"):
                if node.hasAttribute("value") and node.kindOf("value") == "t" and node.t("value").dim():
                    return True
    return False


def _script_tensors(module: Any) -> Iterator[tuple[str, Any, Any]]:
    # They live in C++, not in __dict__: parameters, buffers, and attributes of type Tensor.
    yield from ((".", name, tensor) for name, tensor in module.named_parameters())
    yield from ((".", name, tensor) for name, tensor in module.named_buffers())
    for name, submodule in module.named_modules():
        kind = submodule.__dict__.get("_concrete_type")  # traced and frozen modules have none
        for attribute in kind.get_attributes() if kind is not None else ():
            with contextlib.suppress(AttributeError, RuntimeError):
                yield ".", f"{name}.{attribute}" if name else attribute, getattr(submodule, attribute)


def _attributes(thing: Any) -> Iterator[tuple[str, Any, Any]]:
    # object.__getattribute__ and the class's own slots, so that no property or __getattr__ of the engine runs.
    with contextlib.suppress(AttributeError):
        yield from ((".", name, value) for name, value in list(object.__getattribute__(thing, "__dict__").items()))
    for base in type(thing).__mro__:
        for name, descriptor in _managed_models(base):
            with contextlib.suppress(AttributeError):
                yield ".", name, descriptor.__get__(thing)


@functools.lru_cache(1024)
def _managed_models(cls: type) -> list[tuple[str, types.MemberDescriptorType]]:
    return [(name, value) for name, value in vars(cls).items() if isinstance(value, types.MemberDescriptorType)]


def _path(trail: _Trail) -> str:
    steps = []
    while trail is not _ROOT:
        trail, how, step = trail
        steps.append(_step(how, step))
    return "".join(reversed(steps))


def _step(how: str, step: Any) -> str:
    return f"[{_readable(step)}]" if how == "[]" else f".{step}"


def _readable(key: Any) -> str:
    # Others' repr is others' code.
    return repr(key) if type(key) in VALUES else f"<{type(key).__name__}>"


def _free(path: str, taken: Collection[str]) -> str:
    unique = path
    for number in itertools.count(2):
        if unique not in taken:
            return unique
        unique = f"{path} ({number})"  # different keys may read the same
    raise AssertionError("there is always a free number")
