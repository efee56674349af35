"""The desk where requests are taken: queue, wait, hand over, take back. It serves `Lease`."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import math
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from .dispatch import Dispatcher
from .errors import LeaseDeadlock, ModelBusy, RequestCancelled, RequestTimeout, ResidencyError
from .latches import holds, new_latch
from .leasing import Lease, held_slots
from .planning import would_wait_for_itself
from .states import Request, Slot, State

logger = logging.getLogger(__name__)


class Admission:
    """One request after the other on each model, in order of arrival. ``check_locked`` raises where none are taken."""

    def __init__(self, dispatcher: Dispatcher, check_locked: Callable[[Slot], None]) -> None:
        self._dispatcher = dispatcher
        self._check_locked = check_locked
        self._clock = dispatcher.clock
        self._numbers = itertools.count(1)

    def acquire(self, slot: Slot, timeout_s: float | None, lease: Lease) -> Request:
        """For `Lease`: wait for its turn and for the model to come to the device; return the request that has it."""
        dispatcher = self._dispatcher
        with self._dispatcher.lock:
            self._check_locked(slot)
            now_s = self._clock.now()
            request = Request(slot, next(self._numbers), threading.get_ident(), held_slots(), now_s)
            try:
                self._refuse_if_futile_locked(request, timeout_s)
            except ResidencyError as error:
                slot.history.refused(error)
                raise
            if slot.left_s is not None and not slot.in_use:
                slot.policy.idle_ended(max(0.0, now_s - slot.left_s))
                slot.left_s = None  # learned once, even if this request comes to nothing
            request.context = contextvars.copy_context()
            lease.request = request
            if lease.cancelled:
                raise RequestCancelled(slot.name)
            slot.queue.append(request)
            dispatcher.plan_locked(slot)
        dispatcher.act()
        if not request.answered:
            self._wait(request, lease, now_s, timeout_s)
        if request.error is not None:
            raise request.error
        return request

    def share(self, lease: Lease, request: Request) -> bool:
        """For `Lease`: let it count on a request in force as well; False if that has ended."""
        with self._dispatcher.lock:
            if self._dispatcher.slots.get(request.slot.name) is not request.slot:
                self._check_locked(request.slot)  # in a forked child: the engine is the parent's
            if not request.users:
                return False
            if lease.cancelled:
                raise RequestCancelled(request.slot.name)
            request.users += 1
            lease.request = request
            return True

    def give_back(
        self, lease: Lease, discard: bool = False, error: BaseException | None = None, wait: bool = True
    ) -> None:
        """For `Lease`: end it, and wait for what the end of a request brings, so that the caller finds it done."""
        dispatcher = self._dispatcher
        if holds(dispatcher.lock):  # a generator that was in the middle of a request, collected under the lock
            self.give_back_later(lease, discard)
            return
        lost = dispatcher.is_lost(error)
        with dispatcher.lock:
            now_s = self._clock.now()
            request, lease.request = lease.request, None  # from here to the plan nothing is called: see `Dispatcher`
            if request is None:
                return
            slot = request.slot
            request.users -= 1
            if slot.holder is request:
                slot.broken = slot.broken or discard
                if lost:
                    dispatcher.lost_locked()
                if not request.users:
                    slot.left_s = slot.idle_since_s = now_s
                    slot.not_before_s = -math.inf
                    slot.stuck = False
                    slot.holder = None
            if request.users or dispatcher.slots.get(slot.name) is not slot:
                return
            if request.answered:
                dispatcher.plan_locked(slot)
            else:
                self._refuse_locked(request, RequestCancelled(slot.name))
            task = slot.task
            if request.error is None:
                slot.history.served(request.asked_s, request.served_s, now_s, failed=error is not None)
            else:
                slot.history.refused(request.error)
        dispatcher.act()
        # Who was refused, or waits no longer, has nothing to do with a model that is leaving.
        if not wait or task is None or task.arrives or request.error is not None:
            return
        if not dispatcher.await_task_that_goes_on(task):
            logger.error("%s: hangs on its way off the device; its last request is answered", slot.name)

    def give_back_later(self, lease: Lease, discard: bool = False) -> None:
        """For `Lease`: let the monitor end it, or whoever acts next."""
        self._dispatcher.left.append(partial(self.give_back, lease, discard, wait=False))
        self._dispatcher.monitor.wake()

    def look_again(self) -> None:
        """For `Lease`: have the monitor find what somebody who was interrupted left undone."""
        self._dispatcher.monitor.wake()

    def cancel(self, request: Request) -> bool:
        """For `Lease`: refuse a request that waits; False if it was answered already."""
        with self._dispatcher.lock:
            if request.answered:
                return False
            self._refuse_locked(request, RequestCancelled(request.slot.name))
        self._dispatcher.act()
        return True

    def place(self, request: Request) -> int | None:
        """For `Lease`: 0 holds the model, 1 is served next; None if it has ended."""
        with self._dispatcher.lock:
            if request.slot.holder is request:
                return 0
            waiting = list(request.slot.waiting())
            return waiting.index(request) + 1 if request in waiting else None

    def _refuse_locked(self, request: Request, error: ResidencyError) -> None:
        request.answer(error)
        with suppress(ValueError):  # one that was made and never queued
            request.slot.queue.remove(request)
        self._dispatcher.reports.tell_queue(request.slot)
        self._dispatcher.plan_locked(request.slot)

    def _refuse_if_futile_locked(self, request: Request, timeout_s: float | None) -> None:
        slot, holding = request.slot, request.holding
        at_once = slot.at is State.DEVICE and slot.task is None and not slot.in_use and not slot.broken
        if timeout_s == 0 and not at_once:
            raise ModelBusy(slot.name, sum(1 for _ in slot.waiting()), slot.state.value)
        if slot.holder is not None and slot.holder.thread == request.thread and _in_event_loop():
            raise RuntimeError(
                f"Another task of this event loop holds {slot.name!r}, and waiting would block it too: take leases "
                f"in worker threads (asyncio.to_thread)."
            )
        if holding and would_wait_for_itself(request, self._dispatcher.slots.values()):
            raise LeaseDeadlock(slot.name, tuple(held.name for held in holding))
        if slot.max_waiting < math.inf and not at_once:
            waiting = sum(1 for _ in slot.waiting())
            if waiting >= slot.max_waiting and slot.in_use:
                raise ModelBusy(slot.name, waiting, slot.state.value)

    def _wait(self, request: Request, lease: Lease, asked_s: float, timeout_s: float | None) -> None:
        slot, latch = request.slot, new_latch()
        until_s = math.inf if timeout_s is None else asked_s + timeout_s
        with self._dispatcher.lock:
            request.latch = latch
            self._dispatcher.reports.tell_queue(slot)
            slot.changed()
        while not request.answered:
            with self._dispatcher.lock:
                now_s = self._clock.now()
                if lease.cancelled and not request.answered:
                    self._refuse_locked(request, RequestCancelled(slot.name))
                elif now_s >= until_s and not request.answered:
                    place = list(slot.waiting()).index(request) + 1
                    self._refuse_locked(request, RequestTimeout(slot.name, now_s - asked_s, place, slot.state.value))
            if not request.answered:
                self._clock.wait(latch, until_s - now_s)
        self._dispatcher.act()


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
