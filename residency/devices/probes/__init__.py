"""Memory measurements without torch: None where unknown; they never raise and create no CUDA context."""

from .card import CardProbe, TorchProbe
from .host import HostProbe
from .nvml import NvmlProbe, NvmlUnavailable
from .processes import remeasured, sample

__all__ = ["CardProbe", "HostProbe", "NvmlProbe", "NvmlUnavailable", "TorchProbe", "remeasured", "sample"]
