"""Interface of card probes, and a fallback without NVML."""

from __future__ import annotations

import sys
from typing import Protocol

from ...contracts import Memory, Telemetry


class CardProbe(Protocol):
    """Measurements of one card: fields are None when unknown; never raises, creates no CUDA context."""

    name: str

    def memory(self) -> Memory: ...

    def telemetry(self) -> Telemetry: ...

    def holders(self) -> tuple[tuple[int, int | None], ...]:
        """Returns the processes that hold memory of the card: (pid, bytes or None if unknown)."""


class TorchProbe:
    """Sizes of ``cuda:index`` from torch, once it has a CUDA context."""

    def __init__(self, index: int = 0) -> None:
        self.name = f"CUDA GPU {index}"
        self._index = index

    def memory(self) -> Memory:
        torch = sys.modules.get("torch")
        try:
            if torch is None or not torch.cuda.is_initialized() or not torch._C._cuda_hasPrimaryContext(self._index):
                return Memory()
            free_bytes, total_bytes = torch.cuda.mem_get_info(self._index)
        except RuntimeError:  # the device is gone
            return Memory()
        return Memory(total_bytes, free_bytes)

    def telemetry(self) -> Telemetry:
        return Telemetry()

    def holders(self) -> tuple[tuple[int, int | None], ...]:
        return ()
