"""What each kind of neighbour offers: another GPU server on this machine, which somebody else wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Held:
    """The memory that a neighbour reports, and whether it is in use.

    ``in_use``: it computes now, or has requests waiting. ``idle_bytes``: device bytes that it would give up, 0 if
    nothing, None if it does not say; an upper limit where it only knows its allocator. ``models``: names of the
    models that it holds, if it tells.
    """

    in_use: bool
    idle_bytes: int | None
    models: tuple[str, ...] = ()


class Neighbor(Protocol):
    """One server. Its methods send requests and block; any thread may call them, also several at a time."""

    @property
    def kind(self) -> str: ...

    @property
    def url(self) -> str:
        """Its address, without a token."""

    @property
    def gives_back(self) -> bool:
        """Whether the server needs `give_back`, because it does not load again by itself."""

    def held(self) -> Held:
        """Asks what it holds, by requests that change nothing (2 s each). Raises `NeighborUnreachable`."""

    def ask(self) -> None:
        """Asks it to give up what it holds idle; returns once it has answered (60 s for each request).

        Memory may come free later than the answer. Call it only after a `held` that is not in use. Raises
        `NeighborUnreachable`, `NeighborRefused` if it answers with an error, or `InvalidInput` if this would end the
        app.
        """

    def give_back(self) -> None:
        """Undoes `ask` where `gives_back`; otherwise does nothing. Raises as `ask`. May be repeated."""
