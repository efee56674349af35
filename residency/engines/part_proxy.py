"""Something inside an engine, known by the way that leads to it: a `Part` holds nothing of what leaves the device."""

from __future__ import annotations

import contextlib
import functools
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
    """A step into a container; other steps are names of attributes."""

    key: Any

    def __str__(self) -> str:
        return f"[{self.key!r}]"


class Held:
    """First step of a path to an object that the engine made and does not keep.

    Holds the object, and the engine weakly. Usable until that engine is released.
    """

    def __init__(self, thing: Any, engine: Any) -> None:
        self._thing = thing
        try:
            self._engine: Callable[[], Any] = weakref.ref(engine)
        except TypeError:  # a tuple or a dictionary, for example
            self._engine = lambda: engine

    def of(self, engine: Any) -> Any:
        """The thing, or `PartGone` if another engine has come since."""
        if self._engine() is not engine:
            raise PartGone(type(self._thing).__name__)
        return self._thing

    def __str__(self) -> str:
        return f".(a {type(self._thing).__name__})"


Path = tuple["str | Item | Held", ...]


class LeasedEngine(Protocol):
    """Who has the engine. Each of these takes a lease."""

    def read_part(self, path: Path) -> Any:
        """What is there: a value, a tensor's copy, or a `Part`."""

    def use_part(self, path: Path, use: Callable[[Any], Any]) -> Any:
        """What ``use`` answers, given what is there."""

    def call_part(self, path: Path, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """What is there, called; a `Part` may be an argument."""


class Part:
    """Something of the engine that holds memory of the device, or a method of it: each use takes a lease.

    Attributes and items are read, and calls made, as on the thing itself; so are its length, its truth and what it
    iterates over (of a mapping the keys, of others what is at 0, 1 and so on). A `Part` may be an argument.

    Answers are copies at any depth, as of a state_dict: tensors, arrays, containers, dataclasses. A module or another
    object in an answer that holds memory of the device is a `Part` again; one that the engine does not keep is held
    by its `Part` alone, and gone (`PartGone`) once the engine has been released. Anything else that would read the
    engine's memory after the lease is refused (`NotHandedOut`). Functions that are given as arguments run under the
    lease and get the engine's own objects: they clone what they keep. For other uses there is the engine's own lease.
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
    """What a path leads to."""

    def step_to(thing: Any, step: str | Item | Held) -> Any:
        if isinstance(step, Held):
            return step.of(engine)
        return thing[step.key] if isinstance(step, Item) else getattr(thing, step)

    return functools.reduce(step_to, path, engine)


def find_paths(engine: Any, wanted: Mapping[int, Any]) -> dict[int, Path]:
    """The shortest path to each of these objects, by id; those that no path leads to are left out."""
    found: dict[int, Path] = {}
    seen = {id(engine): engine}  # kept, so that no other object takes an id meanwhile
    managed_models: dict[type, list[tuple[str, Any]] | None] = {}  # by kind; None for one that is not entered
    todo: deque[tuple[Any, _Trail]] = deque([(engine, None)])
    while todo and len(found) < len(wanted):
        thing, trail = todo.popleft()
        if id(thing) in wanted and _leads_to(path := _path(trail), engine, thing):
            found[id(thing)] = path
        for step, child in _steps(thing, managed_models.get(type(thing)) or ()):
            kind = type(child)
            if kind not in managed_models:
                managed_models[kind] = None if _is_leaf(kind) else _managed_models(kind)
            if managed_models[kind] is not None and id(child) not in seen:
                seen[id(child)] = child
                todo.append((child, (trail, step)))
    return found


def instance_attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yields the attributes in ``__dict__`` and slots; runs no property or ``__getattr__``."""
    yield from _attributes(thing, _managed_models(type(thing)))


_Trail = tuple[Any, "str | Item"] | None


def _path(trail: _Trail) -> Path:
    steps: list[str | Item] = []
    while trail is not None:
        trail, step = trail
        steps.append(step)
    return tuple(reversed(steps))


def _steps(thing: Any, managed_models: Sequence[tuple[str, Any]]) -> Iterator[tuple[str | Item, Any]]:
    if isinstance(thing, dict):
        yield from ((Item(key), value) for key, value in list(dict.items(thing)))
    elif isinstance(thing, (list, tuple, deque)):
        yield from ((Item(index), value) for index, value in enumerate(list(thing)))
    for name, value in _attributes(thing, managed_models):
        if name == "_modules" and isinstance(value, dict):  # torch reads them as attributes
            yield from list(value.items())
        elif type(value) not in _SIZED or value:  # a module has a dozen empty ones
            yield name, value


def _attributes(thing: Any, managed_models: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    with contextlib.suppress(AttributeError):
        yield from list(object.__getattribute__(thing, "__dict__").items())
    for name, managed in managed_models:
        with contextlib.suppress(AttributeError):
            yield name, managed.__get__(thing)


def _managed_models(kind: type) -> list[tuple[str, Any]]:
    classes = [vars(base) for base in kind.__mro__ if "__slots__" in vars(base)]
    members = [member for names in classes for member in names.items()]
    return [(name, managed) for name, managed in members if isinstance(managed, types.MemberDescriptorType)]


def _is_leaf(kind: type) -> bool:
    """Values, what leads out of the engine, and what marks itself: a manager, whose other models are not of it."""
    return issubclass(kind, _LEAVES) or getattr(kind, "not_of_the_engine", False) is True


def _leads_to(path: Path, engine: Any, thing: Any) -> bool:
    """Whether it does, also where a class has a property of that name."""
    try:
        return follow(path, engine) is thing
    except Exception:
        return False


def unwrapped(value: Any, engine: Any) -> Any:
    """An argument as the engine wants it."""
    return follow(value._path, engine) if isinstance(value, Part) else value


def asked_by_tools(name: str) -> bool:
    """Whether copy, pickle or a shell looks for this (``__deepcopy__``, ``_repr_html_``), which is no request."""
    return name.startswith("__") or (name.startswith("_") and name.endswith("_"))


def not_settable(what: str, name: str) -> AttributeError:
    """Why it would have no effect, and what has."""
    return AttributeError(
        f"{name!r} cannot be set on {what}; set it on the engine: in the function that is given as load=, or until the "
        f"engine is released: with tts.lease() as engine. / 无法在此设置 {name!r}：请在引擎上设置，写在 load= 的"
        f"函数中，或写在 with tts.lease() as engine 中（引擎释放后失效）。"
    )
