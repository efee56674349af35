"""Detects requests that wait for the code that makes them, directly or through other code."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable

from ..errors import EventLoopBlocked, LeaseDeadlock
from .callers import CallSite, call_site, in_thread_pool, is_this_thread
from .dispatcher import Dispatcher
from .held import LeaseData, held_models
from .managed_model import LeaseRequest, ManagedModel
from .planner import would_wait_for_itself

STALLED_AFTER_S = 3.0
"""How long a suspended generator may pause before a request in the thread that resumes it counts as a deadlock."""


class DeadlockDetector:
    """Compares call stacks with the current leases. Methods that end in ``_locked`` need the dispatcher's lock."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def kept_busy_locked(self, site: CallSite, made_after: Iterable[LeaseRequest] = ()) -> tuple[ManagedModel, ...]:
        """Returns the models that this code holds according to the call stack, in addition to those in its context."""
        models = self._dispatcher.managed_models.values()
        holders = [holder for managed in models if (holder := managed.leases.holder) is not None and holder.users]
        return tuple(
            [
                holder.managed
                for holder in holders
                if holder.site.resumed_by(site) or (holder in made_after and not holder.site.executes())
            ]
        )

    @staticmethod
    def same_flow(holder: LeaseRequest, site: CallSite, lease: LeaseData) -> bool:
        """Returns whether the code that holds the model makes the request, so that it would wait for itself."""
        there = holder.site
        if is_this_thread(there) and there.executes_here():
            return True
        return there.same_flow(site) or (holder in lease.made_after and not there.executes())

    def found_at_arrival_locked(self, request: LeaseRequest, blocks: bool) -> RuntimeError | None:
        """Returns the error of a request that would wait forever, or None. ``blocks``: its thread waits."""
        managed, holder = request.managed, request.managed.leases.holder
        if holder is not None and holder.site.resumed_by(request.site):
            return self.error(request)
        if blocks and holder is not None and self._in_the_loop_of(holder, request.site):
            return EventLoopBlocked(managed.name, "lease()", managed.leases.held_by(self._dispatcher.clock.now()))
        if request.holding and would_wait_for_itself(request, self._dispatcher.managed_models.values()):
            return self.error(request)
        return None

    def found_while_waiting(self, holder: LeaseRequest, request: LeaseRequest, blocks: bool) -> bool:
        """Returns whether the code that holds the model cannot continue before the request is answered.

        A wait with a time-out ends by itself, so it is no deadlock; the status shows it.
        """
        wait_s = holder.site.waits_for(request.site)
        request.awaited = wait_s is not None
        if wait_s == math.inf:
            return True
        same_loop = self._in_the_loop_of(holder, request.site)
        resumes_it = blocks and (same_loop or holder.site.token is request.site.token or _in_event_loop())
        if not resumes_it or holder.site.executes() or (in_thread_pool() and not same_loop):
            return False
        # Suspended, and only this thread resumes it: another thread would have done so in this time.
        return self._dispatcher.clock.now() - max(holder.resumed_s, request.asked_s) >= STALLED_AFTER_S

    def refuse_own(self, call: str, managed_models: Iterable[ManagedModel]) -> None:
        """Raises RuntimeError if a call that waits for these models' requests would wait for its own caller.

        Raises `EventLoopBlocked` if it would wait for a task of the event loop that it blocks.
        """
        site = call_site()
        with self._dispatcher.lock:
            kept_busy = (*held_models(), *self.kept_busy_locked(site))
            if any(held is managed for held in kept_busy for managed in managed_models):
                raise RuntimeError(f"{call} would wait for the lease or the load that called it; leave it first.")
            for managed in managed_models:
                holder = managed.leases.holder
                if holder is not None and holder.users and self._in_the_loop_of(holder, site):
                    raise EventLoopBlocked(managed.name, call, holder.facts(self._dispatcher.clock.now()))

    @staticmethod
    def _in_the_loop_of(holder: LeaseRequest, site: CallSite) -> bool:
        """Returns whether both are in one thread with an event loop, where a blocking wait would stop the holder."""
        return holder.site.token is site.token and _in_event_loop() and not holder.site.executes_here()

    def error(self, request: LeaseRequest) -> LeaseDeadlock:
        """Returns the error for a refused request."""
        holding = tuple(dict.fromkeys(managed.name for managed in request.holding))
        holder = request.managed.leases.held_by(self._dispatcher.clock.now())
        return LeaseDeadlock(request.managed.name, holding, holder)


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
