"""`Part`: a lazy proxy of an object inside an engine; takes a lease for each use."""

from __future__ import annotations

import contextlib
import logging
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from ..errors import PartGone

_LEAVES = (str, bytes, int, float, complex, type(None), type, types.ModuleType, types.FunctionType, logging.Logger)
_SIZED = (dict, OrderedDict, list, tuple, set)


@dataclass(frozen=True)
class Item:
    """Step of a path into a container, by key or index. Steps by attribute are plain strings."""

    key: Any

    def __str__(self) -> str:
        return f"[{self.key!r}]"


class Held:
    """First step of a path to an object that the engine created and does not reference. Valid until its release."""

    def __init__(self, thing: Any, engine: Any) -> None:
        self._thing = thing
        try:
            self._engine: Callable[[], Any] = weakref.ref(engine)
        except TypeError:  # a tuple or a dictionary, for example
            self._engine = lambda: engine

    def of(self, engine: Any) -> Any:
        """Returns the object; raises `PartGone` if ``engine`` is not the engine that created it."""
        if self._engine() is not engine:
            raise PartGone(type(self._thing).__name__)
        return self._thing

    def __str__(self) -> str:
        return f".(a {type(self._thing).__name__})"


Path = tuple["str | Item | Held", ...]


class LeasedEngine(Protocol):
    """Access to the engine by path. Each method takes a lease and returns copies."""

    def read_part(self, path: Path) -> Any:
        """Returns the object at ``path``: a copy, or a `Part`."""

    def use_part(self, path: Path, use: Callable[[Any], Any]) -> Any:
        """Calls ``use`` with the object at ``path``; returns the result."""

    def call_part(self, path: Path, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Calls the object at ``path``; returns the result. Arguments may be `Part`s."""


class Part:
    """Proxy of an object in the engine that holds device memory, or of a bound method. Each use takes a lease.

    Supports attributes, items, calls, ``len``, ``bool`` and iteration (keys of a mapping, items of a sequence).
    Arguments may be `Part`s.

    Results are deep copies: tensors, arrays, containers, dataclasses. Other objects that hold device memory become a
    `Part`; one without a reference in the engine raises `PartGone` after the engine's release. Results that would read
    the engine's memory after the lease raise `NotHandedOut`. Functions given as arguments run under the lease with the
    engine's own objects, and must clone what they keep. For other uses, take a lease of the engine.
    """

    __slots__ = ("_keeper", "_path")

    def __init__(self, keeper: LeasedEngine, path: Path) -> None:
        object.__setattr__(self, "_keeper", keeper)
        object.__setattr__(self, "_path", path)

    def __getattr__(self, name: str) -> Any:
        if asked_by_tools(name) or name in self.__slots__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self._keeper.read_part((*self._path, name))

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise not_settable(f"{self!r}", name)

    def __getitem__(self, key: Any) -> Any:
        return self._keeper.read_part((*self._path, Item(key)))

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._keeper.call_part(self._path, arguments, keywords)

    def __len__(self) -> int:
        return int(self._keeper.use_part(self._path, len))

    def __bool__(self) -> bool:
        return bool(self._keeper.use_part(self._path, bool))

    def __iter__(self) -> Iterator[Any]:
        keys = self._keeper.use_part(self._path, lambda thing: list(thing.keys()) if hasattr(thing, "keys") else None)
        return map(self.__getitem__, range(len(self))) if keys is None else iter(keys)

    def __repr__(self) -> str:
        path = "".join(f".{step}" if isinstance(step, str) else str(step) for step in self._path)
        return f"<{f'{path[1:]} of the engine' if path else 'the engine'}, on the device under a lease only>"


def follow(path: Path, engine: Any) -> Any:
    thing = engine
    for step in path:
        if isinstance(step, Held):
            thing = step.of(engine)
        else:
            thing = thing[step.key] if isinstance(step, Item) else getattr(thing, step)
    return thing


def find_paths(engine: Any, wanted: Mapping[int, Any]) -> dict[int, Path]:
    """Finds the shortest path to each wanted object, by id, breadth first. Leaves out unreachable objects."""
    found: dict[int, Path] = {}
    seen = {id(engine): engine}  # references the objects, so that no id is reused
    slots: dict[type, list[tuple[str, Any]] | None] = {}  # by type; None: a leaf, not searched
    todo: deque[tuple[Any, _Trail]] = deque([(engine, None)])
    while todo and len(found) < len(wanted):
        thing, trail = todo.popleft()
        if id(thing) in wanted and _leads_to(path := _path(trail), engine, thing):
            found[id(thing)] = path
        for step, child in _steps(thing, slots.get(type(thing)) or ()):
            kind = type(child)
            if kind not in slots:
                slots[kind] = None if _is_leaf(kind) else _slots(kind)
            if slots[kind] is not None and id(child) not in seen:
                seen[id(child)] = child
                todo.append((child, (trail, step)))
    return found


def instance_attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yields the attributes in ``__dict__`` and slots; calls no property or ``__getattr__``."""
    yield from _attributes(thing, _slots(type(thing)))


_Trail = tuple[Any, "str | Item"] | None


def _path(trail: _Trail) -> Path:
    steps: list[str | Item] = []
    while trail is not None:
        trail, step = trail
        steps.append(step)
    return tuple(reversed(steps))


def _steps(thing: Any, slots: Sequence[tuple[str, Any]]) -> Iterator[tuple[str | Item, Any]]:
    if isinstance(thing, dict):
        yield from ((Item(key), value) for key, value in list(dict.items(thing)))
    elif isinstance(thing, (list, tuple, deque)):
        yield from ((Item(index), value) for index, value in enumerate(list(thing)))
    for name, value in _attributes(thing, slots):
        if name == "_modules" and isinstance(value, dict):  # attributes of the module, too
            yield from list(value.items())
        elif type(value) not in _SIZED or value:  # a module has a dozen empty ones
            yield name, value


def _attributes(thing: Any, slots: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    with contextlib.suppress(AttributeError):
        yield from list(object.__getattribute__(thing, "__dict__").items())
    for name, slot in slots:
        with contextlib.suppress(AttributeError):
            yield name, slot.__get__(thing)


def _slots(kind: type) -> list[tuple[str, Any]]:
    classes = [vars(base) for base in kind.__mro__ if "__slots__" in vars(base)]  # not members of C types
    members = [member for names in classes for member in names.items()]
    return [(name, slot) for name, slot in members if isinstance(slot, types.MemberDescriptorType)]


def _is_leaf(kind: type) -> bool:
    """Returns true for values, references out of the engine, and classes marked ``not_of_the_engine`` (managers)."""
    return issubclass(kind, _LEAVES) or getattr(kind, "not_of_the_engine", False) is True


def _leads_to(path: Path, engine: Any, thing: Any) -> bool:
    """Returns false if, for example, a property of the class hides the attribute."""
    try:
        return follow(path, engine) is thing
    except Exception:
        return False


def unwrapped(value: Any, engine: Any) -> Any:
    """Returns the engine's object for a `Part`; any other value unchanged."""
    return follow(value._path, engine) if isinstance(value, Part) else value


def asked_by_tools(name: str) -> bool:
    """Returns true for names probed by copy, pickle and shells (``__deepcopy__``, ``_repr_html_``): no lease needed."""
    return name.startswith("__") or (name.startswith("_") and name.endswith("_"))


def not_settable(what: str, name: str) -> AttributeError:
    """Returns the error for an assignment to a proxy, with the alternatives."""
    return AttributeError(
        f"{name!r} cannot be set on {what}; set it on the engine: in the function that is given as load=, or until the "
        f"engine is released: with tts.lease() as engine. / 无法在此设置 {name!r}：请在引擎上设置，写在 load= 的"
        f"函数中，或写在 with tts.lease() as engine 中（引擎释放后失效）。"
    )
