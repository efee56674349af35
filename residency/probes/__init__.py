"""Looks at memory from outside, without torch: None where unknown, never raising, never making a CUDA context."""

from .host import HostProbe
from .nvml import NvmlProbe

__all__ = ["HostProbe", "NvmlProbe"]
