"""Contents for tests of snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from residency.errors import SnapshotUnusable
from residency.memory.checksum import host_checksum
from residency.memory.snapshot import SnapshotFolder

RANGES = [(0, 1000), (1000, 1001), (1001, 5000), (5000, 10_000)]


class Content:
    """10,000 bytes in ranges, as written by weights, and a buffer to read them into."""

    def __init__(self, seed: int = 0) -> None:
        self.raw = torch.randint(0, 256, (10_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        self.hashes = [host_checksum(self.raw[start:stop]) for start, stop in RANGES]
        self.target = torch.zeros_like(self.raw)

    def write(self, folder: SnapshotFolder, name: str = "tts") -> Path:
        before = set(folder.folder.iterdir())
        folder.write(name, RANGES, self.hashes, self.raw)
        new = set(folder.folder.iterdir()) - before
        return new.pop() if new else Path("nothing new")

    def read(self, folder: SnapshotFolder, name: str = "tts") -> bool:
        self.target.zero_()
        folder.read(name, RANGES, self.hashes, self.target)
        return torch.equal(self.target, self.raw)


def listing(folder: SnapshotFolder) -> list[str]:
    return sorted(path.name for path in folder.folder.iterdir())


def refused(folder: SnapshotFolder, content: Content) -> str:
    with pytest.raises(SnapshotUnusable) as error:
        content.read(folder)
    return error.value.reason
