"""Finds and moves the memory of an engine. `adopt` finds all of it without help by the engine."""

from __future__ import annotations

from typing import Any

from ..contracts import Device, Resident
from .borrowed import BorrowedPart, BorrowedResident
from .composite import CompositeResident
from .engine import EngineResident
from .onnx_sessions import OnnxSessions
from .snapshot import SnapshotFolder
from .weights import Weights

__all__ = [
    "BorrowedPart",
    "BorrowedResident",
    "CompositeResident",
    "EngineResident",
    "OnnxSessions",
    "SnapshotFolder",
    "Weights",
    "adopt",
]


def adopt(engine: Any, device: Device, managed: Any) -> Resident:
    """Returns the memory of a freshly loaded engine; see `EngineResident` for the errors.

    ``managed``: the model, with paths to ``skip`` and the ``borrowed_part``, whose memory is not included.
    """
    kept = managed.borrowed_part.part if managed.borrowed_part else None
    return EngineResident(engine, device, managed.skip, excluding=kept if isinstance(kept, EngineResident) else None)
