"""What the web layer needs of the rest of the project."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from ...observability.events import Event
from ...status_types import Status, UsageHistory


class Lease(Protocol):
    """A request that waits for a model, or holds it."""

    @property
    def model(self) -> str:
        """The name of the model."""

    @property
    def place(self) -> int | None:
        """0: holds the model; 1: served next; None: not yet in the queue, or ended."""

    def cancel(self) -> bool:
        """Take it out of the queue; False if it holds the model, or has ended."""


class Manager(Protocol):
    """The GPU manager as the page and the HTTP calls see it. Every method may be called from any thread."""

    @property
    def closed(self) -> bool: ...

    @property
    def device_lost(self) -> Exception | None:
        """Why this process can use the device no more; None if it can."""

    @property
    def version(self) -> int:
        """Another number whenever `status` has something new to tell, but for times and free memory."""

    def status(self) -> Status:
        """The answer to ``GET /gpu/status``; never waits for a move, never counts as use."""

    def history(self) -> UsageHistory:
        """The answer to ``GET /gpu/history``; never waits for a move, never counts as use."""

    def names(self) -> tuple[str, ...]:
        """The models, in order of registration."""

    def configure(
        self, name: str | None = None, *, keep_warm: float | str | None = None, idle_timeout: float | str | None = None
    ) -> None:
        """Change how long a model (None: all) stays. `UnknownModel`, `InvalidInput`."""

    def offload(self, name: str | None = None) -> bool:
        """True: done; False: follows the running request. Blocks while bytes move; `UnknownModel`."""

    def release(self, name: str | None = None) -> bool:
        """True: done; False: follows the running request. Blocks while bytes move; `UnknownModel`."""

    def warm(self, name: str | None = None, *, if_idle: bool = False) -> bool:
        """True: on the device already; False: begun, or left alone because it is in use. `UnknownModel`."""

    def watching(self, watch: Callable[[Lease], object]) -> AbstractContextManager[None]:
        """A block in which ``watch`` sees each lease that is entered, before it waits."""

    def subscribe(self, listener: Callable[[Event], object]) -> Callable[[], None]:
        """Have moves and queues told to ``listener``; call the answer to end that."""
