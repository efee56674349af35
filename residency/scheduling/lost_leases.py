"""Leases that nothing refers to but themselves. They are given back when Python collects them, which may take hours."""

from __future__ import annotations

import gc
import math

from ..contracts import Clock
from .managed_model import ManagedModel

_REST = 20.0
"""A collection of garbage may take long in a large program: then so many times as long passes until the next."""


class LostLeases:
    """Decides when garbage is collected to find them. Methods that end in ``_locked`` need the dispatcher's lock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._next_collection_s = -math.inf
        self.suspected = False

    def look_locked(self, managed: ManagedModel, now_s: float) -> None:
        """Suspect the lease of a model, from time to time, if the code that took it does not execute any more."""
        holder = managed.leases.holder
        if holder is None or now_s < holder.search_s:
            return
        holder.searched_s = now_s
        if now_s >= self._next_collection_s and not holder.site.executes():
            self.suspected = True

    def collect(self) -> None:
        """Collect garbage; leases that are found end at once or with the dispatcher's next `act`."""
        self.suspected = False
        began_s = self._clock.now()
        gc.collect()
        self._next_collection_s = self._clock.now() + _REST * (self._clock.now() - began_s)
