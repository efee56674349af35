"""A model's move to the card, as far as processes that share the card need to know it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from .contracts import Memory
from .errors import ResidencyError
from .sentences import Sentence


@dataclass(frozen=True)
class Arrival:
    """A move to the card.

    Attributes:
        model: the model's name.
        asked_s: when the request for it arrived, by ``time.monotonic``; None for a planned move, which does not wait.
        is_wanted: returns whether a request still waits for it. Any thread.
        waits: is told that the move waits for so many bytes, and why.
    """

    model: str
    asked_s: float | None
    is_wanted: Callable[[], bool]
    waits: Callable[[int, Sentence], None]


def room_for_retry(memory: Memory, own_bytes: int, short_bytes: int, retries: int) -> int | None:
    """Returns for how many free bytes a move waits that found a shared card full; None if waiting does not help.

    The size of a model before its first load is unknown, and an out-of-memory error tells only how much the next
    allocation lacked: so each of the ``retries`` waits for a thirty-second of the card more than was free. Waiting does
    not help if other processes hold less than an eighth of the card: each that has used it keeps some.
    ``own_bytes``: what this process holds, without the move.
    """
    if memory.total_bytes is None or memory.free_bytes is None:
        return None if retries else short_bytes
    if memory.total_bytes - memory.free_bytes - own_bytes < memory.total_bytes // 8:
        return None if retries else memory.free_bytes  # once more, with emptied caches
    return memory.free_bytes + max(short_bytes, memory.total_bytes >> 5)


class CardShare(Protocol):
    """Grants room on a card that other processes use too. Thread-safe."""

    def place(self, arrival: Arrival) -> AbstractContextManager[Callable[[int], None]]:
        """Returns a context for the move, in which it has a place in the queue.

        Its value is a function that waits until so many bytes are free (0 if unknown, before a first load), and claims
        them until the move has ended or calls it again, for another attempt. It raises `NoRoomNow` if no request waits
        for the move, or none any more.
        """


class NoRoomNow(ResidencyError):
    """The card has no room for a planned move, or the request that waited for it has ended."""

    en = "Other processes use the card: the model returns with its next request."
    zh = "其他进程正在使用显卡：模型将在下次请求时返回。"
