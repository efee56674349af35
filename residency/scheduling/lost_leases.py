"""Lost leases: reachable only from themselves. Python's garbage collection ends them, possibly hours later."""

from __future__ import annotations

import gc
import math

from ..contracts import Clock
from .managed_model import ManagedModel

_REST = 20.0
"""Pause after a garbage collection, as a multiple of its duration, which may be long in a large program."""


class LostLeases:
    """Triggers garbage collections to end lost leases. Methods that end in ``_locked`` need the dispatcher's lock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._next_collection_s = -math.inf
        self.suspected = False

    def look_locked(self, managed: ManagedModel, now_s: float) -> None:
        """Checks at intervals whether the code that took a lease still executes; sets ``suspected`` if not."""
        holder = managed.leases.holder
        if holder is None or now_s < holder.search_s:
            return
        holder.searched_s = now_s
        if now_s >= self._next_collection_s and not holder.site.executes():
            self.suspected = True

    def collect(self) -> None:
        """Collects garbage; the leases found end at once or with the dispatcher's next `act`."""
        self.suspected = False
        began_s = self._clock.now()
        gc.collect()
        self._next_collection_s = self._clock.now() + _REST * (self._clock.now() - began_s)
