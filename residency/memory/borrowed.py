"""A part of an engine that its loader receives ready-made, such as a tokenizer; it outlives releases, on the host."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ..contracts import Device
from ..locks import renewed_in_children
from .discovery import Discovery
from .engine import CompositeResident, EngineResident
from .resident import Resident
from .snapshot import SnapshotFolder


class BorrowedPart(EngineResident):
    """The memory of a part that a loader uses but does not build, and its current loan.

    It belongs to its owner before and after, and outlives releases, on the host. ``lock`` protects each move of the
    part: a load that was given up may end during the next one.
    """

    def __init__(self, part: Any, device: Device) -> None:
        self.lock = renewed_in_children(threading.Lock())
        self.loan: BorrowedLoan | None = None
        #: Storages and sessions that were managed here until `hand_back`. Only ids, so that the part can be freed: an
        #: abandoned load may still create an engine around it.
        self._returned: tuple[frozenset[int], frozenset[int]] = frozenset(), frozenset()
        super().__init__(part, device)

    @property
    def storage_keys(self) -> frozenset[int]:
        return super().storage_keys | self._returned[0]

    @property
    def sessions(self) -> frozenset[int]:
        return super().sessions | self._returned[1]

    def borrow_locked(self) -> BorrowedLoan:
        """Lends the part to a load; ends the loan before."""
        self.loan = BorrowedLoan(self)
        return self.loan

    def hand_back(self) -> None:
        """Restores the part to the device as it was given, and ends its management. On an error nothing has changed."""
        with self.lock:
            self.restore()
            self._returned = self.storage_keys, self.sessions
            self._abandon()
            self._added.keep_only(())
            self._sessions.end_management()
            for part in self._self_moving:
                part.end_management()
            self._self_moving.clear()
            self._discovery = Discovery(None)
            self.loan = None

    def _abandon(self) -> None:
        self._loaded.keep_only(())  # the part belongs to its owner


class BorrowedLoan:
    """A borrowed part, as seen by one engine; after the next loan it is empty and moves nothing. Thread-safe."""

    def __init__(self, part: BorrowedPart) -> None:
        self._part = part

    @property
    def device_bytes(self) -> int:
        return self._part.device_bytes if self._part.loan is self else 0

    @property
    def host_bytes(self) -> int:
        return self._part.host_bytes if self._part.loan is self else 0

    def joined_with(self, engine: Resident) -> Resident:
        return CompositeResident(self, engine)

    def restore(self) -> int:
        return self._unless_ended(self._part.restore)

    def offload(self) -> int:
        return self._unless_ended(self._part.offload)

    def release(self) -> int:
        return self.offload()

    def save(self, store: SnapshotFolder, name: str) -> int:
        return self.offload()

    def load(self, store: SnapshotFolder, name: str) -> int:
        return 0

    def _unless_ended(self, move: Callable[[], int]) -> int:
        with self._part.lock:
            return move() if self._part.loan is self else 0
