from __future__ import annotations

from pathlib import Path

import pytest
from snapshot_files import Content

from residency.memory.snapshot import SnapshotFolder


@pytest.fixture
def folder(tmp_path: Path) -> SnapshotFolder:
    return SnapshotFolder(tmp_path / "snapshots")


@pytest.fixture
def content() -> Content:
    return Content()
