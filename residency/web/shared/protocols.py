"""Protocols of the manager and its leases, as the web layer uses them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from ...observability.events import Event
from ...status_types import Status, UsageHistory


class Lease(Protocol):
    """A request that waits for a model, or uses it."""

    @property
    def model(self) -> str:
        """Name of the model."""

    @property
    def place(self) -> int | None:
        """0: uses the model; 1: next in the queue; None: not yet in the queue, or ended."""

    def cancel(self) -> bool:
        """Removes the request from the queue; returns False if it uses the model, or has ended."""


class Manager(Protocol):
    """The interface of the GPU manager for the page and the HTTP API. Thread-safe."""

    @property
    def closed(self) -> bool: ...

    @property
    def device_lost(self) -> Exception | None:
        """The error after which this process cannot use the device any more, or None."""

    @property
    def version(self) -> int:
        """Changes whenever `status` changes, except for times and free memory."""

    def status(self) -> Status:
        """Returns the response of ``GET /gpu/status``; never waits for a move, never counts as use."""

    def history(self) -> UsageHistory:
        """Returns the response of ``GET /gpu/history``; never waits for a move, never counts as use."""

    def names(self) -> tuple[str, ...]:
        """Returns the names of the models, in order of registration."""

    def configure(
        self, name: str | None = None, *, keep_warm: float | str | None = None, idle_timeout: float | str | None = None
    ) -> None:
        """Changes the timeouts of a model (None: all). Raises `UnknownModel`, `InvalidInput`."""

    def offload(self, name: str | None = None) -> bool:
        """Returns True if done, False if it follows the running request. Blocks while moving. Raises `UnknownModel`."""

    def release(self, name: str | None = None) -> bool:
        """Returns True if done, False if it follows the running request. Blocks while moving. Raises `UnknownModel`."""

    def warm(self, name: str | None = None, *, if_idle: bool = False) -> bool:
        """Returns True if already on the device, False if started, or skipped because in use. Raises `UnknownModel`."""

    def watching(self, watch: Callable[[Lease], object]) -> AbstractContextManager[None]:
        """Calls ``watch`` with each lease that is entered within this block, before it waits."""

    def subscribe(self, listener: Callable[[Event], object]) -> Callable[[], None]:
        """Calls ``listener`` with events of moves and queues; returns a function that unsubscribes it."""
