"""The desk where requests are taken: queue, wait, hand over, take back. It serves `Lease`."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from .callers import CallSite, call_site, in_thread_pool, is_this_thread
from .dispatch import Dispatcher
from .errors import Holder, LeaseDeadlock, ModelBusy, RequestCancelled, RequestTimeout, ResidencyError
from .latches import holds, new_latch
from .leasing import Lease, held_slots
from .planning import would_wait_for_itself
from .states import Request, Slot, State

logger = logging.getLogger(__name__)


FIRST_LOOK_S = 0.05
"""When a request that waits first looks whether it waits for itself, after its arrival; then at growing intervals."""

LONGEST_PAUSE_S = 8.0
"""The longest of these intervals."""

STALLED_AFTER_S = 3.0
"""How long a suspended generator may stand still before a request in the thread that resumes it gives up waiting."""

TELL_AFTER_S = 30.0
"""How long a request waits for another one until the log says so."""

SMALL_BYTES = 64 << 20
SMALL_LEAVES_WITHIN_S = 0.25
"""A model of at most so many bytes has left the device when the block of a lease ends, if it leaves in that time."""


class Admission:
    """One request after the other on each model, in order of arrival. ``check_locked`` raises where none are taken.

    ``wait_timeout_s`` is how long a request that names no time of its own waits for its turn and for room at most; the
    time in which the model is brought to the device is not counted.
    """

    def __init__(
        self, dispatcher: Dispatcher, check_locked: Callable[[Slot], None], wait_timeout_s: float = math.inf
    ) -> None:
        self._dispatcher = dispatcher
        self._check_locked = check_locked
        self._clock = dispatcher.clock
        self._wait_timeout_s = wait_timeout_s
        self._numbers = itertools.count(1)

    def acquire(self, slot: Slot, timeout_s: float | None, lease: Lease) -> Request:
        """For `Lease`: wait for its turn and for the model to come to the device; return the request that has it."""
        dispatcher, site = self._dispatcher, call_site()
        with self._dispatcher.lock:
            self._check_locked(slot)
            now_s = self._clock.now()
            holder = slot.holder
            if (
                holder is not None
                and timeout_s != 0  # which asks for a model that is not in use
                and self._same_flow(holder, site, lease)
                and self._share_locked(lease, holder)
            ):
                return holder
            holding = (*held_slots(), *self.kept_busy_locked(site, lease.made_after))
            request = Request(slot, next(self._numbers), site, holding, now_s)
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
            lease.owns = True
            if lease.cancelled:
                raise RequestCancelled(slot.name)
            slot.queue.append(request)
            dispatcher.plan_locked(slot)
        dispatcher.act()
        if not request.answered:
            self._wait(request, lease, now_s, timeout_s)
        if request.error is not None:
            raise request.error
        return lease.request or request

    def share(self, lease: Lease, request: Request) -> bool:
        """For `Lease`: let it count on a request in force as well; False if that has ended."""
        with self._dispatcher.lock:
            if self._dispatcher.slots.get(request.slot.name) is not request.slot:
                self._check_locked(request.slot)  # in a forked child: the engine is the parent's
            return self._share_locked(lease, request)

    def join(self, lease: Lease, slot: Slot) -> bool:
        """For `Lease`: let it count on the request that has the model now; False if none has."""
        with self._dispatcher.lock:
            self._check_locked(slot)
            # Once the lease of that request has ended, readers must not keep the model from those who wait for it.
            return slot.holder is not None and not slot.holder.ended and self._share_locked(lease, slot.holder)

    def resumed(self, request: Request) -> None:
        """For `Lease`: the generator in which the model is leased goes on, maybe in another thread."""
        request.streams = True
        request.site = call_site()
        request.resumed_s = self._clock.now()

    def suspended(self, request: Request) -> None:
        """For `Lease`: the generator in which the model is leased yields."""
        request.site = request.site.suspended()

    def kept_busy_locked(self, site: CallSite, made_after: Iterable[Request] = ()) -> tuple[Slot, ...]:
        """The models that this code keeps busy, as far as the call stack tells and the context does not."""
        holders = [slot.holder for slot in self._dispatcher.slots.values() if slot.holder is not None]
        return tuple(
            holder.slot
            for holder in holders
            if holder.users and (holder.site.resumed_by(site) or (holder in made_after and not holder.site.executes()))
        )

    @staticmethod
    def _same_flow(holder: Request, site: CallSite, lease: Lease) -> bool:
        """Whether a request is made by the code that has the model, so that waiting would be waiting for itself."""
        there = holder.site
        if is_this_thread(there) and there.executes_here():
            return True
        return there.same_flow(site) or (holder in lease.made_after and not there.executes())

    @staticmethod
    def _share_locked(lease: Lease, request: Request) -> bool:
        if not request.users:
            return False
        if lease.cancelled:
            raise RequestCancelled(request.slot.name)
        request.users += 1
        lease.request = request
        lease.owns = False
        return True

    def give_back(
        self, lease: Lease, discard: bool = False, error: BaseException | None = None, wait: bool = True
    ) -> None:
        """For `Lease`: end it, and begin what follows from the end of a request.

        The caller does not wait until the model has left the device, unless the model is small.
        """
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
            request.ended = request.ended or lease.owns
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
        leaves = wait and task is not None and not task.arrives and request.error is None
        small = slot.device_bytes <= SMALL_BYTES
        if leaves and not small and dispatcher.monitor.alive:
            return  # the monitor starts it: a thread that moves bytes would take this one's turn to answer
        dispatcher.act()
        if leaves and small:
            dispatcher.watch(slot, lambda: slot.task is not task, SMALL_LEAVES_WITHIN_S)

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
            raise ModelBusy(slot.name, sum(1 for _ in slot.waiting()), slot.state.value, self._facts(slot.holder))
        holder = slot.holder
        if holder is not None and holder.site.resumed_by(request.site):
            raise LeaseDeadlock(slot.name, _names(holding), self._facts(holder))
        if holder is not None and holder.site.thread == request.site.thread and _in_event_loop():
            raise RuntimeError(
                f"Another task of this event loop holds {slot.name!r}, and waiting would block it too: take leases "
                f"in worker threads (asyncio.to_thread)."
            )
        if holding and would_wait_for_itself(request, self._dispatcher.slots.values()):
            raise LeaseDeadlock(slot.name, _names(holding), self._facts(holder))
        if slot.max_waiting < math.inf and not at_once:
            waiting = sum(1 for _ in slot.waiting())
            if waiting >= slot.max_waiting and slot.in_use:
                raise ModelBusy(slot.name, waiting, slot.state.value, self._facts(slot.holder))

    def _wait(self, request: Request, lease: Lease, asked_s: float, timeout_s: float | None) -> None:
        slot, latch = request.slot, new_latch()
        until_s = limit_s = asked_s + (self._wait_timeout_s if timeout_s is None else timeout_s)
        look_s, tell_s = asked_s + FIRST_LOOK_S, asked_s + TELL_AFTER_S
        with self._dispatcher.lock:
            request.latch = latch
            arrived_before_s = slot.arrived_for_s(asked_s)
            self._dispatcher.reports.tell_queue(slot)
            slot.changed()
        while not request.answered:
            with self._dispatcher.lock:
                now_s = self._clock.now()
                if timeout_s is None:
                    until_s = limit_s + slot.arrived_for_s(now_s) - arrived_before_s
                late = now_s >= until_s
                if lease.cancelled and not request.answered:
                    self._refuse_locked(request, RequestCancelled(slot.name))
                elif late and not request.answered:
                    place = list(slot.waiting()).index(request) + 1
                    facts = self._facts(slot.holder)
                    self._refuse_locked(
                        request, RequestTimeout(slot.name, now_s - asked_s, place, slot.state.value, facts)
                    )
            if now_s >= look_s and not request.answered:
                self._end_deadlock(request, lease)
                look_s = now_s + min(max(now_s - asked_s, FIRST_LOOK_S), LONGEST_PAUSE_S)
            if now_s >= tell_s and not request.answered and (facts := self._facts(slot.holder)) is not None:
                logger.warning(
                    "%s: a request has waited for %.0f s; the model is %s", slot.name, now_s - asked_s, facts.en
                )
                tell_s = math.inf
            if not request.answered:
                self._clock.wait(latch, min(until_s, look_s) - now_s)
        self._dispatcher.act()

    def _end_deadlock(self, request: Request, lease: Lease) -> None:
        """Serve or refuse a request that turns out to wait for the code that makes it."""
        slot = request.slot
        holder = slot.holder
        if holder is None or not holder.users:
            return
        shares = self._same_flow(holder, request.site, lease)
        if not shares and not self._waits_for(holder, request):
            return
        with self._dispatcher.lock:
            if request.answered or slot.holder is not holder:
                return
            if shares and self._share_locked(lease, holder):
                request.answer()
                slot.queue.remove(request)
                self._dispatcher.reports.tell_queue(slot)
                slot.changed()
            elif not shares:
                self._refuse_locked(request, LeaseDeadlock(slot.name, _names(request.holding), self._facts(holder)))

    def _waits_for(self, holder: Request, request: Request) -> bool:
        """Whether the code that has the model cannot go on before the request is answered."""
        if holder.site.waits_for(request.site.thread):
            return True
        resumes_it = holder.site.token is request.site.token or _in_event_loop()
        if not resumes_it or holder.site.executes() or in_thread_pool():
            return False
        # Suspended, and this thread is the one to resume it. Another thread would have done so meanwhile.
        return self._clock.now() - max(holder.resumed_s, request.asked_s) >= STALLED_AFTER_S

    def _facts(self, holder: Request | None) -> Holder | None:
        if holder is None or not holder.users:
            return None
        return holder.facts(self._clock.now())


def _names(slots: Iterable[Slot]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(slot.name for slot in slots))


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
