"""Proxies of an engine in a worker process."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from typing import Any

from ..engines.part_proxy import Part, Path, Token, asked_by_tools
from .calls import END, Call, NextItem, Read, SetValue, Stream, Use
from .process import WorkerProcess


class RemoteCalls:
    """Calls of an engine in a worker; the methods are those of `EngineCalls`. Parts in results are ``keeper``'s."""

    def __init__(self, worker: WorkerProcess, keeper: Any) -> None:
        self._worker = worker
        self._keeper = keeper

    def read(self, path: Path) -> Any:
        return self._kept(self._worker.ask(Read(path), self._keeper))

    def use(self, path: Path, use: Callable[[Any], Any]) -> Any:
        return self._kept(self._worker.ask(Use(path, use), self._keeper))

    def call(self, path: Path, arguments: tuple[Any, ...], keywords: dict[str, Any], streams: bool = True) -> Any:
        answer = self._worker.ask(Call(path, arguments, keywords, streams), self._keeper)
        return self._items(answer.number) if isinstance(answer, Stream) else self._kept(answer)

    def set(self, path: Path, name: str, value: Any) -> None:
        """Sets an attribute of the object at ``path``, until the release of the engine."""
        self._worker.ask(SetValue(path, name, value))

    def _items(self, stream: int) -> Generator[Any, None, None]:
        ended = False
        try:
            while True:
                item = self._worker.ask(NextItem(stream), self._keeper)
                ended = item == END
                if ended:
                    return
                yield self._kept(item)
        except Exception:
            ended = True  # the worker has dropped it
            raise
        finally:
            if not ended:
                self._worker.ask(NextItem(stream, close=True))

    def _kept(self, answer: Any) -> Any:
        """Frees an object of the worker that has no path in the engine when its part here is collected."""
        if isinstance(answer, Part) and answer._path and isinstance(answer._path[0], Token):
            weakref.finalize(answer._path[0], self._worker.forget, answer._path[0].number)
        return answer


class RemoteEngine:
    """An engine in a worker process, as a lease returns it: attributes, calls and results are those of the engine.

    Values are copies; objects that hold device memory, and those that cannot be pickled, are a `Part`. Arguments are
    pickled: functions among them run in the worker, on copies of what they refer to.
    """

    __slots__ = ("__weakref__", "_calls", "_worker")

    def __init__(self, worker: WorkerProcess) -> None:
        object.__setattr__(self, "_worker", worker)
        object.__setattr__(self, "_calls", RemoteCalls(worker, self))

    def calls_for(self, keeper: Any) -> RemoteCalls:
        """Returns calls whose parts belong to ``keeper``."""
        return RemoteCalls(self._worker, keeper)

    def __getattr__(self, name: str) -> Any:
        if asked_by_tools(name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self._calls.read((name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._calls.set((), name, value)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._calls.call((), arguments, keywords)

    def __repr__(self) -> str:
        return f"<engine of {self._worker.name!r} in the worker process {self._worker.pid}>"

    # The keeper of its parts: see `Part`.

    def read_part(self, path: Path) -> Any:
        return self._calls.read(path)

    def use_part(self, path: Path, use: Callable[[Any], Any]) -> Any:
        return self._calls.use(path, use)

    def call_part(self, path: Path, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        return self._calls.call(path, arguments, keywords)

    def set_part(self, path: Path, name: str, value: Any) -> None:
        self._calls.set(path, name, value)
