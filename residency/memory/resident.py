"""The protocol of movable memory."""

from __future__ import annotations

from typing import Protocol

from .snapshot import SnapshotFolder


class Resident(Protocol):
    """The movable memory of a model. Called from one thread at a time, and never while a lease is held.

    Moves are atomic and idempotent: after an error everything is where it was before the call.
    """

    @property
    def device_bytes(self) -> int:
        """Current bytes on the device."""

    @property
    def host_bytes(self) -> int:
        """Current bytes in main memory."""

    def offload(self) -> int:
        """Moves from the device to the host; returns the bytes moved."""

    def restore(self) -> int:
        """Moves back to the device; returns the bytes moved."""

    def release(self) -> int:
        """Frees device and host memory; returns the bytes freed. Never raises; the engine is unusable afterwards."""

    def save(self, store: SnapshotFolder, name: str) -> int:
        """Writes a snapshot and frees all memory; returns the bytes freed. The engine stays as a skeleton.

        Raises `SnapshotUnusable` if that is impossible; then everything is on device or host.
        """

    def load(self, store: SnapshotFolder, name: str) -> int:
        """Reads a snapshot into host memory; returns the bytes read.

        Raises `SnapshotUnusable` if it is missing or damaged; then only `release` is possible.
        """
