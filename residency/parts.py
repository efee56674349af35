"""Something inside an engine, known by the way that leads to it: a `Part` holds nothing of what leaves the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol


@dataclass(frozen=True)
class Item:
    """A step into a container; other steps are names of attributes."""

    key: Any

    def __str__(self) -> str:
        return f"[{self.key!r}]"


Path = tuple["str | Item", ...]


class Keeper(Protocol):
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
    iterates over (of a mapping the keys, of others what is at 0, 1 and so on). Answers are the engine's, and a `Part`
    may be an argument. For anything else there is the engine's own lease.
    """

    __slots__ = ("_keeper", "_path")

    def __init__(self, keeper: Keeper, path: Path) -> None:
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
        return f"<{path[1:]} of the engine, on the device under a lease only>"


def follow(path: Path, engine: Any) -> Any:
    """What a path leads to."""

    def step_to(thing: Any, step: str | Item) -> Any:
        return thing[step.key] if isinstance(step, Item) else getattr(thing, step)

    return functools.reduce(step_to, path, engine)


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
