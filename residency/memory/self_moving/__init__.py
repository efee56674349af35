"""Objects in an engine that free and restore their GPU memory by their own means, recognized by class.

vLLM, SGLang and CTranslate2 keep weights where no walk of Python objects reaches them: in worker processes, or in
native code. `moves_of` finds the functions that move such an object; `register` adds a class. Imports none of them.
"""

from __future__ import annotations

from typing import Any

from . import ctranslate2, sglang, vllm
from .moves import OwnMoves

__all__ = ["OwnMoves", "moves_of", "register", "registered"]

_by_name: dict[str, OwnMoves] = {**ctranslate2.MOVES, **sglang.MOVES, **vllm.MOVES}
registered: dict[str, OwnMoves] = {}
"""Entries of `register`."""


def register(name: str, moves: OwnMoves) -> None:
    """Adds a class by package and name (``vllm.LLM``); its module within the package does not matter.

    Call it before the engine is loaded. Subclasses are recognized too. Replaces an earlier entry of that name.
    """
    _by_name[name] = registered[name] = moves


def moves_of(cls: type) -> OwnMoves | None:
    """Returns the functions for instances of a class, or None.

    A class with methods ``offload_from_gpu`` and ``restore_to_gpu`` needs no entry; ``release_from_gpu`` is optional.
    """
    for base in cls.__mro__:
        if found := _by_name.get(f"{base.__module__.partition('.')[0]}.{base.__name__}"):
            return found
    return _PROTOCOL if hasattr(cls, "offload_from_gpu") and hasattr(cls, "restore_to_gpu") else None


def _release(thing: Any) -> None:
    if release := getattr(thing, "release_from_gpu", None):
        release()


_PROTOCOL = OwnMoves(lambda thing: thing.offload_from_gpu(), lambda thing: thing.restore_to_gpu(), _release)
