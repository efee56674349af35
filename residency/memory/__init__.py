"""Finds and moves the memory of an engine. `adopt` finds all of it without help by the engine."""

from .borrowed import BorrowedPart
from .engine import CompositeResident, EngineResident, adopt
from .onnx_sessions import OnnxSessions
from .resident import Resident
from .snapshot import SnapshotFolder
from .weights import Weights

__all__ = [
    "BorrowedPart",
    "CompositeResident",
    "EngineResident",
    "OnnxSessions",
    "Resident",
    "SnapshotFolder",
    "Weights",
    "adopt",
]
