"""Reads, uses and calls the objects of an engine by their path; the results outlive an offload."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from ..memory.discovery import discover
from ..observability.error_classification import all_of
from .answers import HandOut, is_bound, is_stream
from .part_proxy import Part, Path, follow, unwrapped

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class EngineCalls:
    """Calls of one engine, under a lease. Results and attributes of errors are copies of what an offload would free.

    Objects that hold device memory become a `Part` of ``keeper``. ``holds_tensor`` is the device's.
    """

    def __init__(self, engine: Any, keeper: Any, holds_tensor: Callable[[torch.Tensor], bool]) -> None:
        self._engine = engine
        self._keeper = keeper
        self._holds_tensor = holds_tensor

    def read(self, path: Path) -> Any:
        """Returns the value at ``path``: the object itself, a tensor's copy, or a `Part`."""
        with self._own_errors():
            value = follow(path, self._engine)
            if not _is_tensor(value) and (is_bound(value) or _holds_memory(value)):
                return Part(self._keeper, path)
            return self.copied(value)

    def use(self, path: Path, use: Callable[[Any], Any]) -> Any:
        """Returns a copy of what ``use`` returns for the object at ``path``."""
        with self._own_errors():
            return self.copied(use(follow(path, self._engine)))

    def call(self, path: Path, arguments: tuple[Any, ...], keywords: dict[str, Any], streams: bool = True) -> Any:
        """Calls the object at ``path``; a stream is returned as a generator of copies, or refused (`NotHandedOut`)."""
        there = {name: unwrapped(value, self._engine) for name, value in keywords.items()}
        with self._own_errors():
            answer = follow(path, self._engine)(*(unwrapped(value, self._engine) for value in arguments), **there)
            return self._items(answer) if streams and is_stream(answer) else self.copied(answer)

    def copied(self, answer: T) -> T:
        """Returns the answer with copies of what an offload would free."""
        copy: T = HandOut(self._keeper, self._engine, self._holds_tensor, _holds_memory)(answer)
        return copy

    def _items(self, stream: Iterator[Any]) -> Generator[Any, None, None]:
        generator = closing(stream) if isinstance(stream, Generator) else nullcontext()
        with self._own_errors(), generator:
            for item in stream:
                yield self.copied(item)

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """Replaces the attributes of errors by copies, in place, and clears the locals of their frames."""
        callers = list(all_of(sys.exc_info()[1], hidden=True))
        try:
            yield
        except Exception as error:
            for found in all_of(error, hidden=True):
                if any(found is other for other in callers):
                    continue
                traceback.clear_frames(found.__traceback__)
                if isinstance(found, AttributeError):
                    found.obj = None
                if _holds_memory((found.args, vars(found))):
                    found.args, attributes = self.copied((found.args, vars(found)))
                    vars(found).update(attributes)
            raise


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _holds_memory(value: Any) -> bool:
    found = discover(value)
    return bool(found.tensors or found.sessions or found.self_moving)
