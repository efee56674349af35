"""Finds everything of an engine that holds memory: tensors and ONNX Runtime sessions, wherever they hang.

Names of attributes are no way to find memory: the walk follows attributes, slots, containers, modules
(TorchScript included), bound methods, partial functions and closures, each object once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Not entered: values, and what leads out of the engine into the rest of the process.
_LEAVES = (str, bytes, bytearray, int, float, complex, type(None), type, types.ModuleType, logging.Logger)


@dataclass
class Found:
    """Tensors and sessions by the path that leads to them from the engine (``.vad._model.weight``)."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    sessions: dict[str, Any] = field(default_factory=dict)


def discover(engine: Any) -> Found:
    """Walk the object graph of an engine. It is not changed, and no property of it is evaluated."""
    import torch

    found = Found()
    seen: dict[int, Any] = {}
    todo: list[tuple[str, Any]] = [("", engine)]
    while todo:
        path, thing = todo.pop()
        if isinstance(thing, _LEAVES) or id(thing) in seen:
            continue
        seen[id(thing)] = thing  # kept, so that no other object takes this id during the walk
        if isinstance(thing, torch.Tensor):
            found.tensors[path] = thing
        elif _is_session(thing):
            found.sessions[path] = thing
            continue
        todo.extend((path + step, child) for step, child in _children(thing))
    return found


def _is_session(thing: Any) -> bool:
    # By name, since onnxruntime need not be installed: an engine that has a session has imported it.
    bases = type(thing).__mro__
    return any(base.__name__ == "InferenceSession" and base.__module__.startswith("onnxruntime") for base in bases)


def _children(thing: Any) -> Iterator[tuple[str, Any]]:
    import torch

    if isinstance(thing, torch.jit.ScriptModule):
        # Its attributes live in C++ and are not in __dict__.
        yield from ((f".{name}", tensor) for name, tensor in thing.named_parameters())
        yield from ((f".{name}", tensor) for name, tensor in thing.named_buffers())
    elif isinstance(thing, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in list(thing.items()))
    elif isinstance(thing, (list, tuple, set, frozenset)) or type(thing).__name__ == "deque":
        yield from ((f"[{index}]", value) for index, value in enumerate(list(thing)))
    elif isinstance(thing, types.MethodType):
        yield ".__self__", thing.__self__
    elif isinstance(thing, functools.partial):
        yield from ((".func", thing.func), (".args", thing.args), (".keywords", thing.keywords))
    elif isinstance(thing, types.FunctionType):
        for index, cell in enumerate(thing.__closure__ or ()):
            try:
                yield f".__closure__[{index}]", cell.cell_contents
            except ValueError:  # a cell that was never filled
                continue
        return
    yield from _attributes(thing)


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    # object.__getattribute__ and the class's own slots, so that no property or __getattr__ of the engine runs.
    with contextlib.suppress(AttributeError):
        yield from ((f".{name}", value) for name, value in list(object.__getattribute__(thing, "__dict__").items()))
    for base in type(thing).__mro__:
        for name, descriptor in list(vars(base).items()):
            if isinstance(descriptor, types.MemberDescriptorType):
                try:
                    yield f".{name}", descriptor.__get__(thing)
                except AttributeError:
                    continue
