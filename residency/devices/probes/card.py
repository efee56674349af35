"""What a card is asked for, and the answers where NVML gives none."""

from __future__ import annotations

import sys
from typing import Protocol

from ...contracts import Memory, Telemetry


class CardProbe(Protocol):
    """Looks at one card: fields are None when unknown; never raises, never creates a CUDA context."""

    name: str

    def memory(self) -> Memory: ...

    def telemetry(self) -> Telemetry: ...

    def holders(self) -> tuple[tuple[int, int | None], ...]:
        """The processes that hold memory of the card: (pid, bytes or None where that is unknown)."""


class TorchProbe:
    """The sizes of ``cuda:index`` as torch knows them, from the time on when it has a CUDA context there."""

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
