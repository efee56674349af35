"""Protocols of the manager and its leases, as the web layer uses them. `GPUResourceManager` describes the methods."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from ...contracts import Time
from ...observability.events import Event
from ...receipts import Receipt
from ...status_types import Status, UsageHistory


class QueuedLease(Protocol):
    """A request that waits for a model, or uses it."""

    @property
    def model(self) -> str: ...
    @property
    def place(self) -> int | None:
        """0: uses the model; 1: next in the queue; None: not yet in the queue, or ended."""

    @property
    def receipt(self) -> Receipt | None:
        """How long it waited; None before it has the model."""

    queued: Callable[[], object] | None
    """Is called once it is in the queue, or has the model."""

    def cancel(self) -> bool: ...


class Manager(Protocol):
    """The interface of the GPU manager for the page and the HTTP API. Thread-safe. A name of None: all models."""

    @property
    def closed(self) -> bool: ...
    @property
    def device_lost(self) -> Exception | None: ...
    @property
    def version(self) -> int: ...
    def status(self) -> Status: ...
    def history(self) -> UsageHistory: ...
    def names(self) -> tuple[str, ...]: ...
    def configure(self, name: str | None = None, *, keep_warm: Time = None, idle_timeout: Time = None) -> None: ...
    def offload(self, name: str | None = None) -> bool: ...
    def release(self, name: str | None = None) -> bool: ...
    def warm(self, name: str | None = None, *, if_idle: bool = False) -> bool: ...
    def ask_neighbor(self, url: str) -> None: ...
    def watching(self, watch: Callable[[QueuedLease], object]) -> AbstractContextManager[None]: ...
    def subscribe(self, listener: Callable[[Event], object]) -> Callable[[], None]: ...
