"""The extras of this package: optional dependencies that a plain ``pip install`` omits."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import ExtraMissing

OURS = {"app", "gpu_manager", "residency", "tts_gpu_managed"}


def require(extra: str, *modules: str) -> None:
    """Raises `ExtraMissing` unless all these top-level modules of an extra can be imported."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ExtraMissing(extra, module)


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Raises `ExtraMissing` for a module that is not installed, in a block that imports modules of an extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if not module or module in OURS:
            raise
        raise ExtraMissing(extra, module) from error
