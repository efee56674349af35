"""Keeps the requests of a sender in order of arrival until they are in the engine's queue, however long checks take."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..speech.service import RECOGNIZER

_BODY_WITHIN_S = 2.0
"""Longest wait of later requests for an earlier one's body and stored voice. Short, because behind some proxies all
clients share one address."""


class Turns:
    """The requests that are not yet in the engine's queue. Thread-safe. ``now`` returns seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.changed = threading.Condition()
        self.waiting: list[Turn] = []

    @contextmanager
    def taken(self, sender: str) -> Iterator[Turn]:
        """Yields the turn of a request that has just arrived; ends it with the block."""
        turn = Turn(self, sender)
        with self.changed:
            self.waiting.append(turn)
        try:
            yield turn
        finally:
            turn.end()


class Turn:
    """The turn of a request. ``waited_s``: seconds that it has waited for earlier requests."""

    def __init__(self, turns: Turns, sender: str) -> None:
        self._turns, self._sender = turns, sender
        self._recognizes = False
        self.waited_s = 0.0
        self._counts_until_s = turns.now() + _BODY_WITHIN_S

    def received(self) -> None:
        """The body and the stored voice are here: later requests now wait until this one is queued, or has ended."""
        self._counts_until_s = math.inf

    def joins(self, lease: Any) -> None:
        """Waits for the request's turn to enter the queue of a lease. Call it before the lease waits.

        In the recognizer's queue the request no longer delays others that need it. Its turn ends in the engine's queue.
        """
        recognizes = lease.model == RECOGNIZER
        self.wait(recognizes)
        lease.queued = self._in_recognizers_queue if recognizes else self.end

    def wait(self, recognizes: bool = False) -> None:
        """Waits for all earlier requests of the sender, or until `end` is called.

        ``recognizes``: not for those that are, or were, in the recognizer's queue.
        """
        began_s = self._turns.now()
        with self._turns.changed:
            while (left_s := self._left_s(recognizes)) > 0:
                self._turns.changed.wait(min(left_s, threading.TIMEOUT_MAX))
        self.waited_s += self._turns.now() - began_s

    def _in_recognizers_queue(self) -> None:
        with self._turns.changed:
            self._recognizes = True
            self._turns.changed.notify_all()

    def end(self) -> None:
        """Ends the turn: the request is in the engine's queue, or has failed. May be called repeatedly."""
        with self._turns.changed:
            if self in self._turns.waiting:
                self._turns.waiting.remove(self)
                self._turns.changed.notify_all()

    def _left_s(self, recognizes: bool = False) -> float:
        if self not in self._turns.waiting:
            return 0.0
        earlier = self._turns.waiting[: self._turns.waiting.index(self)]
        until_s = (
            turn._counts_until_s
            for turn in earlier
            if turn._sender == self._sender and not (recognizes and turn._recognizes)
        )
        return max(until_s, default=-math.inf) - self._turns.now()
