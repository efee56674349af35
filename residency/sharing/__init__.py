"""Shares one card with other processes: leaves when they need room, and waits for room in order of arrival."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Sharing"]


@dataclass(frozen=True)
class Sharing:
    """How a manager shares its card with other processes.

    Attributes:
        headroom_bytes: idle models leave the card when less is free; 0: they do not.
        neighbors: servers that are asked to give up what they hold idle: ``"ollama=http://127.0.0.1:11434"``, or
            ``"auto"`` for those that are found by their processes on the card.
        folder: where processes of this project, also in other containers, queue for room on the card; None: they do
            not.
    """

    headroom_bytes: int = 0
    neighbors: tuple[str, ...] = field(default=(), repr=False)  # may have tokens
    folder: str | Path | None = None
