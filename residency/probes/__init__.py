"""Looks at memory from outside, without torch: None where unknown, never raising, never making a CUDA context."""

from .host import HostProbe
from .nvml import NvmlProbe
from .processes import sample

__all__ = ["HostProbe", "NvmlProbe", "sample"]
