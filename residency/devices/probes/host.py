"""Main memory, through psutil."""

from __future__ import annotations

import psutil

from ...contracts import Memory


class HostProbe:
    """``free_bytes`` is what can be had without swapping; ``process_bytes`` is this process's resident set."""

    def memory(self) -> Memory:
        try:
            machine = psutil.virtual_memory()
            return Memory(machine.total, machine.available, psutil.Process().memory_info().rss)
        except (psutil.Error, OSError):
            return Memory()
