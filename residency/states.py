"""The states of a model and the transitions between them. Pure data: no locks, clock or torch.

A model is in one of three settled states, or in a moving state between them::

    RELEASED --LOADING----> DEVICE      first request: the loader runs
    DEVICE   --OFFLOADING-> HOST        last lease ended and keep-warm ran out, or another model needs the room
    HOST     --RESTORING--> DEVICE      next request, or shortly before it is expected
    HOST     --RELEASING--> RELEASED    idle timeout, or by hand
    DEVICE   --RELEASING--> RELEASED    by hand, at the idle timeout where device and host are one memory, or broken

A failed move returns to the settled state before it, unless its bytes have already left. A load that was given up
returns to RELEASED; a late engine is discarded.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

Place = Literal["gpu", "cpu", "released"]
ShownState = Literal["gpu", "cpu", "released", "moving"]


class State(enum.Enum):
    """The location of a model's bytes, or the direction of their move."""

    RELEASED = "released"
    LOADING = "loading"
    DEVICE = "device"
    OFFLOADING = "offloading"
    HOST = "host"
    RESTORING = "restoring"
    RELEASING = "releasing"

    @property
    def settled(self) -> bool:
        """Whether no move is running."""
        return self in SETTLED

    def place(self, device_kind: str) -> Place:
        """Returns the location that users see, for a settled state.

        If the device is the CPU, a model is never shown on a ``gpu``.
        """
        if self is State.RELEASED:
            return "released"
        return "cpu" if self is State.HOST or device_kind == "cpu" else "gpu"

    def shown(self, device_kind: str) -> ShownState:
        """Returns the location that users see, for any state."""
        return self.place(device_kind) if self.settled else "moving"


SETTLED = frozenset({State.RELEASED, State.DEVICE, State.HOST})

#: (source, target) -> the moving state between them. There are no other moves.
TRANSITIONS: dict[tuple[State, State], State] = {
    (State.RELEASED, State.DEVICE): State.LOADING,
    (State.DEVICE, State.HOST): State.OFFLOADING,
    (State.HOST, State.DEVICE): State.RESTORING,
    (State.HOST, State.RELEASED): State.RELEASING,
    (State.DEVICE, State.RELEASED): State.RELEASING,
}


@dataclass(frozen=True)
class Move:
    """One planned transition of one model."""

    model: str
    source: State
    target: State

    @property
    def via(self) -> State:
        """The moving state; raises KeyError if there is no such move."""
        return TRANSITIONS[self.source, self.target]
