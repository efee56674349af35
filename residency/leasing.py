"""The lease: the right to use a model, and the memory of who holds one."""

from __future__ import annotations

import contextvars
import threading
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
    arrival), loads or restores the model and gives the engine. It blocks its thread: asyncio programs enter it in a
    worker thread. Who holds a lease and enters another one on the same model, in the same thread of control or in
    work started with its context (`asyncio.to_thread`), shares the first; the model is given back when all have
    left. ``prefetch`` marks a lease that only brings the model.
    """

    #: Discovery stops here: behind a lease there are the manager and other models.
    not_of_the_engine = True

    def __init__(self, lessor: Lessor, slot: Slot, *, prefetch: bool = False) -> None:
        self.lessor = lessor
        self.slot = slot
        self.prefetch = prefetch
        self.error: BaseException | None = None
        self.thread: int | None = None
        self._shared: Lease | None = None  # the lease that this one, entered or left, counts on
        self._users = 0
        self._lock = threading.Lock()
        self._entered = False

    def __enter__(self) -> Any:
        if self._entered:
            raise RuntimeError("A lease can be used once; call lease() again.")
        self._entered = True
        outer = next((lease for lease in held_leases() if lease.slot is self.slot), None)
        if outer is not None and outer._join():
            self._shared = outer
            return self.slot.engine
        self.thread = threading.get_ident()
        engine = self.lessor.acquire(self)
        self._users = 1
        self._shared = self
        _held.set((*held_leases(), self))
        return engine

    def __exit__(self, *exc_info: object) -> None:
        shared, self._shared = self._shared, None
        if shared is not None and shared._leave():
            _held.set(held_leases())
            self.lessor.give_back(shared)

    def _join(self) -> bool:
        with self._lock:
            self._users += self._users > 0
            return self._users > 0

    def _leave(self) -> bool:
        with self._lock:
            self._users -= 1
            return self._users == 0


def held_leases() -> tuple[Lease, ...]:
    """The leases that this thread of control holds (thread, or asyncio task: see `contextvars`)."""
    return tuple(lease for lease in _held.get() if lease._users)
