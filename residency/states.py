"""Where a model is and how it may change. Pure data: no locks, no clock, no torch.

A model rests in one of three settled states and passes through a moving state on its way between them::

    RELEASED --LOADING----> DEVICE      first request: the loader runs
    DEVICE   --OFFLOADING-> HOST        last lease ended and keep-warm ran out
    HOST     --RESTORING--> DEVICE      next request
    HOST     --RELEASING--> RELEASED    idle timeout, or by hand
    DEVICE   --RELEASING--> RELEASED    by hand, or idle timeout where device and host are one memory

A move that fails returns to the settled state it left.
"""

from __future__ import annotations

import enum
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .contracts import Policy, Resident


class State(enum.Enum):
    """Where the bytes of a model are, or which way they travel."""

    RELEASED = "released"
    LOADING = "loading"
    DEVICE = "device"
    OFFLOADING = "offloading"
    HOST = "host"
    RESTORING = "restoring"
    RELEASING = "releasing"

    @property
    def settled(self) -> bool:
        """Whether no move is under way."""
        return self in SETTLED

    def shown(self, device_kind: str) -> str:
        """The word people see: ``gpu``, ``cpu``, ``released`` or ``moving``.

        On a machine without a GPU the device is the CPU, and a model is never shown on a ``gpu``.
        """
        if self is State.RELEASED:
            return "released"
        if self is State.HOST:
            return "cpu"
        if self is State.DEVICE:
            return "cpu" if device_kind == "cpu" else "gpu"
        return "moving"


SETTLED = frozenset({State.RELEASED, State.DEVICE, State.HOST})

#: (settled state left, settled state wanted) -> the state shown on the way. There are no other moves.
TRANSITIONS: dict[tuple[State, State], State] = {
    (State.RELEASED, State.DEVICE): State.LOADING,
    (State.DEVICE, State.HOST): State.OFFLOADING,
    (State.HOST, State.DEVICE): State.RESTORING,
    (State.HOST, State.RELEASED): State.RELEASING,
    (State.DEVICE, State.RELEASED): State.RELEASING,
}


@dataclass(frozen=True)
class Move:
    """One transition of one model, decided but not yet carried out."""

    model: str
    source: State
    target: State

    @property
    def via(self) -> State:
        """The moving state on the way; KeyError if there is no such move."""
        return TRANSITIONS[self.source, self.target]


@dataclass(frozen=True)
class MoveRecord:
    """A move that was carried out: how many bytes changed place, and in how many seconds."""

    move: Move
    moved_bytes: int
    seconds: float


@dataclass
class Slot:
    """The books of one model. Whoever reads or writes it holds the manager's lock.

    ``holder`` is the lease in force and ``queue`` those that wait, in order of arrival. ``asked`` is a place
    that somebody asked for while a request was running, ``mover`` the thread that moves the model now. What hangs on
    the paths in ``skip`` is left alone; ``keep`` is a part of the engine that outlives a release, ``kept`` its
    resident. Times are of the manager's clock, in seconds.
    """

    name: str
    load: Callable[[], Any]
    policy: Policy
    changed: threading.Condition
    state: State = State.RELEASED
    engine: Any = None
    resident: Resident | None = None
    holder: Any = None
    queue: deque[Any] = field(default_factory=deque)
    asked: State | None = None
    mover: int | None = None
    skip: tuple[str, ...] = ()
    keep: Any = None
    kept: Resident | None = None
    closing: bool = False
    idle_since_s: float | None = None
    not_before_s: float = -math.inf
    last_move: MoveRecord | None = None
    last_error: str | None = None

    @property
    def in_use(self) -> bool:
        """Whether a request holds the model or waits for it."""
        return self.holder is not None or bool(self.queue)
