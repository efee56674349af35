"""What of an engine holds memory, and how it moves. `adopt` finds all of it without the engine's help."""

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
    """Take stock of a freshly loaded engine; see `EngineResident` for the errors.

    The borrowed part, which outlives a release, is left out.
    """
    kept = managed.borrowed_part.part if isinstance(managed.borrowed_part, BorrowedPart) else None
    return EngineResident(engine, device, managed.skip, excluding=kept if isinstance(kept, EngineResident) else None)
