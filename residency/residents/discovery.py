"""Finds everything of an engine that holds memory: tensors, ONNX Runtime sessions, CUDA graphs, wherever they hang.

Names of attributes are no way to find memory: the walk follows attributes, slots, containers, modules
(TorchScript included), bound methods, partial functions and closures, each object once.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import types
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

#: Values: nothing hangs on them. By exact type, since subclasses of str or int may carry attributes.
_VALUES = frozenset({str, bytes, bytearray, int, float, complex, bool, type(None), type, types.ModuleType})
#: What leads out of the engine into the rest of the process.
_EXITS = (type, types.ModuleType, logging.Logger)
_CONTAINERS = (dict, list, tuple, set, frozenset)
#: Containers with at least so many entries are looked at as a whole first: a vocabulary need not be walked.
_LARGE = 256

#: How a thing was reached: from where, and by which step. Put into words only for what is found.
_Trail = tuple[Any, str, Any]
_ROOT: _Trail = (None, "", "")


@dataclass
class Found:
    """Tensors, sessions and graphs by the path that leads to them from the engine (``.vad._model.weight``).

    ``references`` says of each tensor (``id``) how many references to it were found in the engine.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    sessions: dict[str, Any] = field(default_factory=dict)
    graphs: dict[str, torch.cuda.CUDAGraph] = field(default_factory=dict)
    references: dict[int, int] = field(default_factory=dict)


class Discovery:
    """Walks the object graph of one engine, as often as wanted; later walks pass by large containers that had none.

    The engine is not changed and no property of it is evaluated. Paths in ``skip`` (``.tokenizer``) are not entered.
    """

    def __init__(self, engine: Any, skip: Collection[str] = ()) -> None:
        self._engine = engine
        self._skip = frozenset(skip)
        self._barren: dict[int, tuple[Any, int]] = {}

    def walk(self) -> Found:
        """Everything that hangs on the engine now."""
        import torch

        found = Found()
        seen: dict[int, Any] = {}
        todo: list[tuple[Any, _Trail]] = [(self._engine, _ROOT)]
        while todo:
            thing, trail = todo.pop()
            if id(thing) in seen or self._known_barren(thing) or _leads_out(thing):
                continue
            seen[id(thing)] = thing  # kept, so that no other object takes this id during the walk
            if self._skip and _path(trail) in self._skip:
                continue
            if issubclass(type(thing), torch.Tensor):
                found.tensors[_free_path(trail, found.tensors)] = thing
            elif _is_session(thing):
                found.sessions[_free_path(trail, found.sessions)] = thing
                continue
            elif issubclass(type(thing), torch.cuda.CUDAGraph):
                found.graphs[_free_path(trail, found.graphs)] = thing
                continue
            if type(thing) in _CONTAINERS and len(thing) >= _LARGE and _is_barren(thing):
                self._barren[id(thing)] = thing, len(thing)
                continue
            try:
                for how, step, child in _children(thing):
                    if issubclass(type(child), torch.Tensor):
                        found.references[id(child)] = found.references.get(id(child), 0) + 1
                    if type(child) not in _VALUES and id(child) not in seen:
                        todo.append((child, (trail, how, step)))
            except Exception:  # an object that does not like to be looked at is no reason not to load
                logger.warning("What hangs on %s cannot be looked at", _path(trail), exc_info=True)
        return found

    def _known_barren(self, thing: Any) -> bool:
        known = self._barren.get(id(thing))
        return known is not None and len(thing) == known[1]


def discover(engine: Any, skip: Collection[str] = ()) -> Found:
    """One walk; see `Discovery`."""
    return Discovery(engine, skip).walk()


def _path(trail: _Trail) -> str:
    steps = []
    while trail is not _ROOT:
        trail, how, step = trail
        steps.append(f"[{_readable(step)}]" if how == "[]" else f".{step}")
    return "".join(reversed(steps))


def _free_path(trail: _Trail, taken: Collection[str]) -> str:
    path = unique = _path(trail)
    for number in itertools.count(2):
        if unique not in taken:
            return unique
        unique = f"{path} ({number})"  # different keys may read the same
    raise AssertionError("there is always a free number")


def _readable(key: Any) -> str:
    # Others' repr is others' code.
    return repr(key) if type(key) in _VALUES else f"<{type(key).__name__}>"


def _leads_out(thing: Any) -> bool:
    # What marks itself: a manager, whose other models are not of this engine.
    return issubclass(type(thing), _EXITS) or getattr(type(thing), "not_of_the_engine", False) is True


def _is_barren(container: Any, depth: int = 2) -> bool:
    """Whether there are only values in a container, and in the containers in it."""
    for child in container.values() if type(container) is dict else container:
        if type(child) in _VALUES:
            continue
        if depth == 0 or type(child) not in _CONTAINERS or not _is_barren(child, depth - 1):
            return False
    return True


def _is_session(thing: Any) -> bool:
    # By name, since onnxruntime need not be installed: an engine that has a session has imported it.
    bases = type(thing).__mro__
    return any(base.__name__ == "InferenceSession" and base.__module__.startswith("onnxruntime") for base in bases)


def _children(thing: Any) -> Iterator[tuple[str, Any, Any]]:
    """What hangs on a thing: (how, step, child); how is ``[]`` for an element and ``.`` for an attribute."""
    import torch

    kind = type(thing)  # not isinstance, which believes what an object says of its class
    if issubclass(kind, torch.Tensor) and thing.is_leaf and thing.grad is not None:
        yield ".", "grad", thing.grad
    if issubclass(kind, torch.jit.ScriptModule):
        yield from _script_tensors(thing)
    elif issubclass(kind, dict):
        yield from (("[]", key, value) for key, value in list(dict.items(thing)))
    elif base := next((base for base in (list, tuple, set, frozenset, deque) if issubclass(kind, base)), None):
        yield from (("[]", index, value) for index, value in enumerate(list(base.__iter__(thing))))
    elif kind is types.MappingProxyType:
        yield from (("[]", key, value) for key, value in list(thing.items()))
    elif kind is types.MethodType:
        yield ".", "__self__", thing.__self__
        yield ".", "__func__", thing.__func__
    elif issubclass(kind, functools.partial):
        yield from ((".", name, getattr(thing, name)) for name in ("func", "args", "keywords"))
    elif kind is types.FunctionType:
        yield from ((".", name, getattr(thing, name)) for name in ("__defaults__", "__kwdefaults__", "__dict__"))
        for index, cell in enumerate(thing.__closure__ or ()):
            with contextlib.suppress(ValueError):  # a cell that was never filled
                yield ".", f"__closure__[{index}]", cell.cell_contents
        return
    if kind not in _CONTAINERS:
        yield from _attributes(thing)


def _script_tensors(module: Any) -> Iterator[tuple[str, Any, Any]]:
    # They live in C++, not in __dict__: parameters, buffers, and attributes of type Tensor.
    yield from ((".", name, tensor) for name, tensor in module.named_parameters())
    yield from ((".", name, tensor) for name, tensor in module.named_buffers())
    for name, submodule in module.named_modules():
        kind = submodule.__dict__.get("_concrete_type")
        if kind is None:
            logger.warning("Constants in the code of a frozen TorchScript module cannot be found, nor moved")
            continue
        for attribute in kind.get_attributes():
            with contextlib.suppress(AttributeError, RuntimeError):
                yield ".", f"{name}.{attribute}" if name else attribute, getattr(submodule, attribute)


def _attributes(thing: Any) -> Iterator[tuple[str, Any, Any]]:
    # object.__getattribute__ and the class's own slots, so that no property or __getattr__ of the engine runs.
    with contextlib.suppress(AttributeError):
        yield from ((".", name, value) for name, value in list(object.__getattribute__(thing, "__dict__").items()))
    for base in type(thing).__mro__:
        for name, descriptor in list(vars(base).items()):
            if isinstance(descriptor, types.MemberDescriptorType):
                with contextlib.suppress(AttributeError):
                    yield ".", name, descriptor.__get__(thing)
