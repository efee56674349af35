"""The name of this process for ``ps`` and ``top``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def name_process(name: str) -> None:
    """Sets the name of this process (``comm``), of which Linux keeps the first 15 bytes."""
    with suppress(OSError):  # a read-only /proc
        Path("/proc/self/comm").write_bytes(name.encode()[:15])
