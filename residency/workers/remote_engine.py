"""Proxies of an engine in a worker process."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

from ..engines.part_proxy import Part, Path
from ..errors import RequestStopped, WorkerDied
from .calls import Call, End, NextItem, Read, SetValue, Stream, Use
from .process import WorkerProcess


class RemoteCalls:
    """Calls of an engine in a worker; the methods are those of `EngineCalls`. Parts in results are ``keeper``'s.

    It is itself a keeper of parts, without leases: see `RemoteEngine`.
    """

    def __init__(self, worker: WorkerProcess, keeper: Any = None) -> None:
        self._worker = worker
        self._keeper = keeper or self

    def read(self, path: Path) -> Any:
        return self._worker.ask(Read(path), self._keeper)

    def use(self, path: Path, use: Callable[[Any], Any]) -> Any:
        return self._worker.ask(Use(path, use), self._keeper)

    def call(self, path: Path, arguments: tuple[Any, ...], keywords: dict[str, Any], streams: bool = True) -> Any:
        answer = self._worker.ask(Call(path, arguments, keywords, streams), self._keeper)
        return self._items(answer.number) if isinstance(answer, Stream) else answer

    def set(self, path: Path, name: str, value: Any) -> None:
        """Sets an attribute of the object at ``path``, until the release of the engine."""
        self._worker.ask(SetValue(path, name, value))

    read_part, use_part, call_part, set_part = read, use, call, set

    def _items(self, stream: int) -> Generator[Any, None, None]:
        ended = False
        try:
            while True:
                item = self._worker.ask(NextItem(stream), self._keeper)
                if ended := isinstance(item, End):
                    return
                yield item
        except Exception:
            ended = True  # the worker has dropped it
            raise
        finally:
            if not ended and self._worker.sends_here:
                self._worker.forget(stream)
            elif not ended:
                with suppress(WorkerDied, RequestStopped):
                    self._worker.ask(NextItem(stream, close=True))


class RemoteEngine(Part):
    """An engine in a worker process, as a lease returns it: attributes, calls and results are those of the engine.

    Values are copies, so that a change in place (``engine.words.append("x")``, ``engine.options["speed"] = 2``) changes
    the copy only; an assignment to an attribute (``engine.speed = 2``, ``engine.words += ["x"]``) sets it in the
    worker, until the release. Objects that hold device memory, and those that cannot be pickled, are a `Part`, whose
    attributes can be set too. Arguments are pickled: functions among them run in the worker, on copies of what they
    refer to.
    """

    __slots__ = ("__weakref__", "_worker")

    def __init__(self, worker: WorkerProcess) -> None:
        super().__init__(RemoteCalls(worker), ())
        object.__setattr__(self, "_worker", worker)

    def calls_for(self, keeper: Any) -> RemoteCalls:
        """Returns calls whose parts belong to ``keeper``."""
        return RemoteCalls(self._worker, keeper)

    def __repr__(self) -> str:
        return f"<engine of {self._worker.name!r} in the worker process {self._worker.pid}>"
