"""`Part`: a lazy proxy of an object inside an engine; takes a lease for each use."""

from __future__ import annotations

import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import PartGone
from ..memory.object_graph import steps_of, visit


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


@dataclass(frozen=True)
class Token:
    """Stands for a `Held` of a worker process in the manager's process, by number."""

    number: int
    text: str

    def __str__(self) -> str:
        return self.text


Path = tuple["str | Item | Held | Token", ...]


class Part:
    """Proxy of an object in the engine that holds device memory, or of a bound method. Each use takes a lease.

    ``keeper``, a `GPUManagedTTS`, takes the leases and copies the results.

    Supports attributes, items, calls, ``len``, ``bool`` and iteration (keys of a mapping, items of a sequence).
    Arguments may be `Part`s.

    Results are deep copies: tensors, arrays, containers, dataclasses. Other objects that hold device memory become a
    `Part`; one without a reference in the engine raises `PartGone` after the engine's release. Results that would read
    the engine's memory after the lease raise `NotHandedOut`. Functions given as arguments run under the lease with the
    engine's own objects, and must clone what they keep. For other uses, take a lease of the engine.
    """

    __slots__ = ("_keeper", "_path")

    def __init__(self, keeper: Any, path: Path) -> None:
        object.__setattr__(self, "_keeper", keeper)
        object.__setattr__(self, "_path", path)

    def __getattr__(self, name: str) -> Any:
        if asked_by_tools(name) or name in self.__slots__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self._keeper.read_part((*self._path, name))

    def __setattr__(self, name: str, value: Any) -> None:
        self._keeper.set_part(self._path, name, value)

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
            thing = thing[step.key] if isinstance(step, Item) else getattr(thing, str(step))
    return thing


def find_paths(engine: Any, wanted: Collection[int]) -> dict[int, Path]:
    """Finds the shortest path to each wanted object (``id``). Leaves out unreachable objects."""
    found: dict[int, Path] = {}
    for thing, trail, _ in visit(engine, usable=_can_be_followed):
        if id(thing) in wanted and _leads_to(path := _path(steps_of(trail)), engine, thing):
            found[id(thing)] = path
            if len(found) == len(wanted):
                break
    return found


def _can_be_followed(thing: Any, how: str, step: Any) -> bool:
    """Returns false for closures of functions, members of sets, and keys of dictionaries."""
    if how == ".":
        return not isinstance(thing, types.FunctionType)
    return isinstance(thing, (list, tuple, deque)) or (isinstance(thing, dict) and step in thing)


def _path(steps: Sequence[tuple[str, Any]]) -> Path:
    """Returns a path for `follow`, where a module in a module (``_modules``) is an attribute."""
    path: list[str | Item] = []
    for how, step in steps:
        if how == ".":
            path.append(step)
        elif path and path[-1] == "_modules":
            path[-1] = step
        else:
            path.append(Item(step))
    return tuple(path)


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
