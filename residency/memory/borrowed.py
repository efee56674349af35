"""A part of an engine that its loader receives ready-made, such as a tokenizer; it outlives releases, on the host."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from ..contracts import Device, Resident, SnapshotStore
from ..locks import renewed_in_children
from .composite import CompositeResident
from .discovery import Discovery
from .engine import EngineResident


class BorrowedMemory(Protocol):
    @property
    def device_bytes(self) -> int: ...
    @property
    def host_bytes(self) -> int: ...
    def offload(self) -> int: ...
    def restore(self) -> int: ...
    def hand_back(self) -> None: ...


class BorrowedPart:
    """A part that a loader uses but does not build: it belongs to its owner and outlives releases, on the host.

    ``lock`` protects each move of the part: a load that was given up may end during the next one.
    """

    def __init__(self, part: BorrowedMemory) -> None:
        self.part = part
        self.lock = renewed_in_children(threading.Lock())
        self.loan: BorrowedLoan | None = None

    @property
    def device_bytes(self) -> int:
        return self.part.device_bytes

    @property
    def host_bytes(self) -> int:
        return self.part.host_bytes

    def offload(self) -> int:
        with self.lock:
            return self.part.offload()

    def borrow_locked(self) -> BorrowedLoan:
        """Lends the part to a load; ends the loan before."""
        self.loan = BorrowedLoan(self)
        return self.loan

    def hand_back(self) -> None:
        """Restores the part to the device as it was given, and ends its management. On an error nothing has changed."""
        with self.lock:
            self.part.hand_back()
            self.loan = None


class BorrowedLoan:
    """A borrowed part, as seen by one engine; after the next loan it is empty and moves nothing. Thread-safe."""

    def __init__(self, kept: BorrowedPart) -> None:
        self._kept = kept

    @property
    def device_bytes(self) -> int:
        return self._kept.device_bytes if self._kept.loan is self else 0

    @property
    def host_bytes(self) -> int:
        return self._kept.host_bytes if self._kept.loan is self else 0

    def joined_with(self, engine: Resident) -> Resident:
        return CompositeResident(self, engine)

    def restore(self) -> int:
        return self._unless_lost(self._kept.part.restore)

    def offload(self) -> int:
        return self._unless_lost(self._kept.part.offload)

    def release(self) -> int:
        return self.offload()

    def save(self, store: SnapshotStore, name: str) -> int:
        return self.offload()

    def load(self, store: SnapshotStore, name: str) -> int:
        return 0

    def _unless_lost(self, move: Callable[[], int]) -> int:
        with self._kept.lock:
            return move() if self._kept.loan is self else 0


class BorrowedResident(EngineResident):
    """The memory of a part that belongs to its owner before and after."""

    _owners: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())

    def __init__(self, part: Any, device: Device) -> None:
        super().__init__(part, device)

    @property
    def storage_keys(self) -> frozenset[int]:
        return super().storage_keys | self._owners[0]

    @property
    def sessions(self) -> frozenset[int]:
        return super().sessions | self._owners[1]

    def hand_back(self) -> None:
        """Restores the part to the device, as it was given, and ends its management."""
        self.restore()
        # Only ids, so that the part can be freed: an abandoned load may still create an engine around it.
        self._owners = self.storage_keys, self.sessions
        self._loaded.keep_only(())
        self._late.keep_only(())
        self._sessions.let_go()
        self._discovery = Discovery(None)

    def _abandon(self) -> None:
        self._loaded.keep_only(())  # the part belongs to its owner
