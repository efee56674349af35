"""The extras of this package: groups of packages that parts of it need, and that a bare ``pip install`` leaves out."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import ExtraMissing

OURS = {"app", "gpu_manager", "residency", "tts_gpu_managed"}


def require(extra: str, *modules: str) -> None:
    """Look whether these top-level modules, which an extra brings, can be imported; `ExtraMissing` if not."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ExtraMissing(extra, module)


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """A block that imports modules of an extra; `ExtraMissing` if one is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if not module or module in OURS:
            raise
        raise ExtraMissing(extra, module) from error
