"""Where a model is and how it may change. Pure data: no locks, no clock, no torch.

A model rests in one of three settled states and passes through a moving state on its way between them::

    RELEASED --LOADING----> DEVICE      first request: the loader runs
    DEVICE   --OFFLOADING-> HOST        last lease ended and keep-warm ran out, or another model needs the room
    HOST     --RESTORING--> DEVICE      next request, or shortly before it is expected
    HOST     --RELEASING--> RELEASED    idle timeout, or by hand
    DEVICE   --RELEASING--> RELEASED    by hand, at the idle timeout where device and host are one memory, or broken

A move that fails returns to the settled state it left. One that was given up (a loader that hangs) does so too, and
what it brings later is thrown away.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

Place = Literal["gpu", "cpu", "released"]
ShownState = Literal["gpu", "cpu", "released", "moving"]


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

    def place(self, device_kind: str) -> Place:
        """What users see of a settled state.

        On a machine without a GPU the device is the CPU, and a model is never shown on a ``gpu``.
        """
        if self is State.RELEASED:
            return "released"
        return "cpu" if self is State.HOST or device_kind == "cpu" else "gpu"

    def shown(self, device_kind: str) -> ShownState:
        """What users see of any state."""
        return self.place(device_kind) if self.settled else "moving"


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
