"""The lease: the right to use a model, and the memory of who holds one."""

from __future__ import annotations

import contextvars
from typing import Any, Protocol

from .states import Slot


class Lessor(Protocol):
    """Who hands leases out: the manager."""

    def acquire(self, lease: Lease) -> Any:
        """Wait for the lease's turn, bring the model to the device and return its engine."""

    def give_back(self, lease: Lease) -> None:
        """End the lease; what was waiting for its end happens now."""


_held: contextvars.ContextVar[tuple[Lease, ...]] = contextvars.ContextVar("held_leases", default=())


class Lease:
    """The right to use one model; while it is held the model cannot be moved.

    A context manager for one use. Entering waits for its turn (requests are served one at a time, in order of
    arrival), loads or restores the model and gives the engine. Entering a lease on a model that the same thread
    of control already holds gives the engine at once. ``prefetch`` marks one that only brings the model.
    """

    def __init__(self, lessor: Lessor, slot: Slot, *, prefetch: bool = False) -> None:
        self.lessor = lessor
        self.slot = slot
        self.prefetch = prefetch
        self.error: BaseException | None = None
        self._entered = False
        self._active = False

    def __enter__(self) -> Any:
        if self._entered:
            raise RuntimeError("A lease can be used once; call lease() again.")
        self._entered = True
        if any(lease.slot is self.slot for lease in held_leases()):
            return self.slot.engine
        engine = self.lessor.acquire(self)
        self._active = True
        _held.set((*held_leases(), self))
        return engine

    def __exit__(self, *exc_info: object) -> None:
        if self._active:
            self._active = False
            _held.set(held_leases())
            self.lessor.give_back(self)


def held_leases() -> tuple[Lease, ...]:
    """The leases that this thread of control holds (thread, or asyncio task: see `contextvars`)."""
    return tuple(lease for lease in _held.get() if lease._active)
