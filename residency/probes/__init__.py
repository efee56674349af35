"""Looks at memory from outside, without torch: None where unknown, never raising, never making a CUDA context."""

from .card import CardProbe, TorchProbe
from .host import HostProbe
from .nvml import NvmlProbe, NvmlUnavailable

__all__ = ["CardProbe", "HostProbe", "NvmlProbe", "NvmlUnavailable", "TorchProbe"]
