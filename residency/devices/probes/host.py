"""Main memory, through psutil."""

from __future__ import annotations

import psutil

from ...contracts import Memory


class HostProbe:
    """``free_bytes``: available without swapping; ``process_bytes``: resident set of this process."""

    def memory(self) -> Memory:
        try:
            machine = psutil.virtual_memory()
            return Memory(machine.total, machine.available, psutil.Process().memory_info().rss)
        except (psutil.Error, OSError):
            return Memory()
