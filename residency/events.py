"""What happens to the models, told to whoever listens: the page, the API, programs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

logger = logging.getLogger(__name__)

What = Literal["began", "progress", "done", "failed"]


@dataclass(frozen=True)
class Event:
    """One thing that happened to one model. Times in seconds of the manager's clock, sizes in bytes.

    ``phase``, ``done_bytes`` and ``total_bytes`` (None: unknown) say how far the move has come; see
    `residency.progress`. ``source`` and ``target`` are states as people see them: ``gpu``, ``cpu``, ``released``.
    """

    what: What
    model: str
    source: str
    target: str
    time_s: float
    seconds: float
    phase: str
    done_bytes: int
    total_bytes: int | None
    error: str | None = None


class Listeners:
    """Who wants to know. Any thread may subscribe at any time.

    Listeners are called in the thread that moves the model, in order for each model, and while no lock is held. One
    that raises is logged and stays subscribed: it cannot harm a move, though a slow one delays it.
    """

    def __init__(self) -> None:
        self._listeners: tuple[Callable[[Event], Any], ...] = ()

    def subscribe(self, listener: Callable[[Event], Any]) -> Callable[[], None]:
        """Have ``listener`` called from now on; call the answer to end that."""
        self._listeners = (*self._listeners, listener)

        def unsubscribe() -> None:
            self._listeners = tuple(other for other in self._listeners if other is not listener)

        return unsubscribe

    def __bool__(self) -> bool:
        return bool(self._listeners)

    def tell(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                logger.exception("A listener failed at %s", event)
