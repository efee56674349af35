"""Finds and moves the memory of an engine. `adopt` finds all of it without help by the engine."""

from __future__ import annotations

from typing import Any

from ..contracts import Adoption, Device, Resident
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


def adopt(engine: Any, device: Device, managed: Adoption) -> Resident:
    """Returns the memory of a freshly loaded engine, without its borrowed part; see `EngineResident` for the errors."""
    kept = managed.borrowed_part.part if isinstance(managed.borrowed_part, BorrowedPart) else None
    return EngineResident(engine, device, managed.skip, excluding=kept if isinstance(kept, EngineResident) else None)
