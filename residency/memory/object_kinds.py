"""How an object is looked at during a walk of an engine, by its class."""

from __future__ import annotations

import collections
import enum
import functools
import logging
import sys
import types
from typing import Any


class ObjectKind(enum.Enum):
    """What a walk does with an instance of a class.

    Attributes:
        CLOSED: nothing of the engine hangs on it, or it leads out into the rest of the process. Not entered.
        OPEN: `gc.get_referents` gives exactly what hangs on it, and its class.
        TENSOR, SESSION, GRAPH, ARRAY: what is looked for. An array is one of numpy's.
        BY_NAME: entered by `paths.children`, since the garbage collector would show too much or too little.
    """

    CLOSED = enum.auto()
    OPEN = enum.auto()
    TENSOR = enum.auto()
    SESSION = enum.auto()
    GRAPH = enum.auto()
    ARRAY = enum.auto()
    BY_NAME = enum.auto()


#: Classes whose instances have no references, or only such as belong to them.
_TRANSPARENT = {
    object, int, float, complex, str, bytes, bytearray, list, dict, tuple, set, frozenset, BaseException,
    collections.deque, collections.OrderedDict, collections.defaultdict, functools.partial, types.SimpleNamespace,
    types.MethodType, types.BuiltinMethodType, types.CellType, types.MappingProxyType,
}  # fmt: skip
if sys.version_info >= (3, 11):  # before, they refer to a frame, and a frame to all that runs
    _TRANSPARENT |= {types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType}
#: Instances of these are values. By exact class, since subclasses may carry attributes.
VALUES = frozenset({str, bytes, bytearray, int, float, complex, bool, type(None), type, types.ModuleType})
#: What leads out of the engine into the rest of the process.
_EXITS = (type, types.ModuleType, logging.Logger, types.FrameType, types.TracebackType, types.CodeType)
_POINTER_BYTES = 8


def kind_of(cls: type) -> ObjectKind:
    """The kind of the instances of a class. Takes some microseconds: remember the answer during a walk."""
    import torch

    # What marks itself: a manager, whose other models are not of this engine.
    if cls in VALUES or issubclass(cls, _EXITS) or getattr(cls, "not_of_the_engine", False) is True:
        return ObjectKind.CLOSED
    if issubclass(cls, torch.Tensor):
        return ObjectKind.TENSOR
    # By name, since onnxruntime need not be installed: an engine that has a session has imported it.
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
    """Whether instances consist of attributes, slots, and what a transparent class has: no state in C of their own."""
    while cls not in _TRANSPARENT:
        base: Any = cls.__base__
        names = sum(isinstance(value, types.MemberDescriptorType) for value in vars(cls).values())
        names += ("__dict__" in vars(cls)) + ("__weakref__" in vars(cls))
        if base is None or cls.__basicsize__ - base.__basicsize__ > names * _POINTER_BYTES:
            return False
        cls = base
    return True
