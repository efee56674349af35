"""What of an engine holds memory, and how it moves. `adopt` finds all of it without the engine's help."""

from .composite import CompositeResident
from .engine import EngineResident
from .onnx import OnnxSessions
from .snapshot import SnapshotFolder
from .weights import Weights

adopt = EngineResident
"""How the manager takes stock of a freshly loaded engine."""

__all__ = ["CompositeResident", "EngineResident", "OnnxSessions", "SnapshotFolder", "Weights", "adopt"]
