"""What of an engine holds memory, and how it moves. `adopt` finds all of it without the engine's help."""

from __future__ import annotations

from typing import Any

from ..contracts import Device, Resident
from .composite import CompositeResident
from .discovery import discover
from .onnx import OnnxSessions
from .snapshot import SnapshotFolder
from .weights import Weights

__all__ = ["CompositeResident", "OnnxSessions", "SnapshotFolder", "Weights", "adopt"]


def adopt(engine: Any, device: Device) -> Resident:
    """Find the tensors and ONNX sessions of a freshly loaded engine and enter them into the device's books.

    `DeviceOutOfMemory` if the device cannot hold them; then nothing stays in the books.
    """
    found = discover(engine)
    return CompositeResident.build(
        lambda: Weights(found.tensors, device),
        lambda: OnnxSessions(found.sessions, device),
    )
