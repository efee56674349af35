"""Classifies objects by class, for walks of an engine."""

from __future__ import annotations

import collections
import enum
import functools
import logging
import sys
import types
from typing import Any

from .self_moving import moves_of


class ObjectKind(enum.Enum):
    """The treatment of a class's instances in a walk.

    Attributes:
        CLOSED: not entered: refers to nothing of the engine, or leads out into the rest of the process.
        OPEN: `gc.get_referents` returns exactly its contents, and its class.
        TENSOR, SESSION, GRAPH, ARRAY: objects to find; arrays are numpy's.
        SELF_MOVING: objects to find that free their GPU memory themselves; not entered.
        BY_NAME: entered by `object_paths.children`, since the garbage collector shows too much or too little.
    """

    CLOSED = enum.auto()
    OPEN = enum.auto()
    TENSOR = enum.auto()
    SESSION = enum.auto()
    GRAPH = enum.auto()
    ARRAY = enum.auto()
    SELF_MOVING = enum.auto()
    BY_NAME = enum.auto()


#: Classes whose instances refer only to their own contents, or to nothing.
_TRANSPARENT = {
    object, int, float, complex, str, bytes, bytearray, list, dict, tuple, set, frozenset, BaseException,
    collections.deque, collections.OrderedDict, collections.defaultdict, functools.partial, types.SimpleNamespace,
    types.MethodType, types.BuiltinMethodType, types.CellType, types.MappingProxyType,
}  # fmt: skip
if sys.version_info >= (3, 11):  # before, they refer to a frame, which leads to all running code
    _TRANSPARENT |= {types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType}
#: Classes of plain values. Exact classes only, since subclasses may have attributes.
VALUES = frozenset({str, bytes, bytearray, int, float, complex, bool, type(None), type, types.ModuleType})
#: Classes that lead out of the engine into the rest of the process.
_EXITS = (type, types.ModuleType, logging.Logger, types.FrameType, types.TracebackType, types.CodeType)
_POINTER_BYTES = 8


def kind_of(cls: type) -> ObjectKind:
    """Returns the kind of a class's instances. Takes some microseconds: cache the result during a walk."""
    import torch

    # The attribute marks managers, whose other models do not belong to this engine.
    if cls in VALUES or issubclass(cls, _EXITS) or getattr(cls, "not_of_the_engine", False) is True:
        return ObjectKind.CLOSED
    if issubclass(cls, torch.Tensor):
        return ObjectKind.TENSOR
    if moves_of(cls) is not None:
        return ObjectKind.SELF_MOVING
    # By name, since onnxruntime need not be installed.
    if any(base.__name__ == "InferenceSession" and base.__module__.startswith("onnxruntime") for base in cls.__mro__):
        return ObjectKind.SESSION
    if issubclass(cls, torch.cuda.CUDAGraph):
        return ObjectKind.GRAPH
    if any(base.__module__ == "numpy" and base.__name__ == "ndarray" for base in cls.__mro__):
        return ObjectKind.ARRAY
    if issubclass(cls, torch.jit.ScriptModule) or not _is_transparent(cls):
        return ObjectKind.BY_NAME
    return ObjectKind.OPEN


def _is_transparent(cls: type) -> bool:
    """Returns whether instances have attributes, slots and the contents of a transparent class, but no C state."""
    while cls not in _TRANSPARENT:
        base: Any = cls.__base__
        names = sum(isinstance(value, types.MemberDescriptorType) for value in vars(cls).values())
        names += ("__dict__" in vars(cls)) + ("__weakref__" in vars(cls))
        if base is None or cls.__basicsize__ - base.__basicsize__ > names * _POINTER_BYTES:
            return False
        cls = base
    return True
