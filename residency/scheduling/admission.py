"""Admits requests: queues them, waits for their turn, grants the model and takes it back. Used by `Lease`."""

from __future__ import annotations

import contextvars
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from ..errors import ModelBusy, RequestCancelled, RequestTimeout, ResidencyError
from ..observability.error_classification import device_is_lost, may_be_device_loss
from ..one_shot_event import AsyncOneShotEvent, holds, new_event
from ..states import State
from .callers import call_site
from .deadlocks import DeadlockDetector
from .dispatcher import WARM_GRACE_S, Dispatcher
from .lease import Lease, held_models
from .managed_model import LeaseRequest, ManagedModel

logger = logging.getLogger(__name__)


FIRST_LOOK_S = 0.05
"""When a request that waits first looks whether it waits for itself, after its arrival; then at growing intervals."""

LONGEST_PAUSE_S = 8.0
"""The longest of these intervals."""

REPORT_AFTER_S = 30.0
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
        self, dispatcher: Dispatcher, check_locked: Callable[[ManagedModel], None], wait_timeout_s: float = math.inf
    ) -> None:
        self._dispatcher = dispatcher
        self._check_locked = check_locked
        self._clock = dispatcher.clock
        self.deadlocks = DeadlockDetector(dispatcher)
        self._wait_timeout_s = wait_timeout_s
        self._numbers = itertools.count(1)

    def acquire(self, managed: ManagedModel, timeout_s: float | None, lease: Lease) -> LeaseRequest:
        """Wait for its turn and for the model to come to the device; return the request that has it."""
        request = self._ask(managed, timeout_s, lease, blocks=True)
        if not request.answered:
            event = request.event = new_event()
            for pause_s in self._looks(request, timeout_s, lease, blocks=True):
                self._clock.wait(event, pause_s)
        if request.error is not None:
            raise request.error
        return lease.request or request

    async def acquire_async(self, managed: ManagedModel, timeout_s: float | None, lease: Lease) -> LeaseRequest:
        """The same, for a coroutine. No thread waits meanwhile."""
        request = self._ask(managed, timeout_s, lease, blocks=False)
        if not request.answered:
            event = request.event = AsyncOneShotEvent()
            for pause_s in self._looks(request, timeout_s, lease, blocks=False):
                await event.wait(pause_s)
        if request.error is not None:
            raise request.error
        return lease.request or request

    def _ask(self, managed: ManagedModel, timeout_s: float | None, lease: Lease, blocks: bool) -> LeaseRequest:
        """The request in force that the lease shares, or one of its own; ``blocks``: its thread waits for it."""
        dispatcher, site = self._dispatcher, call_site(lease.made_at)
        for may_be_lost in (True, False):
            with dispatcher.replanning(managed), dispatcher.lock:
                self._check_locked(managed)
                now_s = self._clock.now()
                holder = managed.leases.holder
                if (
                    holder is not None
                    and timeout_s != 0  # which asks for a model that is not in use
                    and self.deadlocks.same_flow(holder, site, lease)
                    and self._share_locked(lease, holder)
                ):
                    return holder
                holding = (*held_models(), *self.deadlocks.kept_busy_locked(site, lease.made_after))
                request = LeaseRequest(managed, next(self._numbers), site, holding, now_s)
                error = self._refusal_locked(request, timeout_s, blocks)
                if error is None:
                    self._queue_locked(request, lease)
                elif isinstance(error, ModelBusy) or not may_be_lost:
                    managed.history.refused(error)
                    try:
                        raise error
                    finally:
                        del error  # which would keep this frame, and those below it
            if error is None:
                break
            dispatcher.release_lost_leases()  # it would wait for ever, unless the lease that it waits for is lost
        return request

    def _queue_locked(self, request: LeaseRequest, lease: Lease) -> None:
        managed = request.managed
        if managed.times.request_ended_s is not None and not managed.leases.in_use:
            managed.policy.idle_ended(max(0.0, request.asked_s - managed.times.request_ended_s))
            managed.times.request_ended_s = None  # learned once, even if this request comes to nothing
        request.context = contextvars.copy_context()
        lease.request = request
        lease.owns = True
        if lease.cancelled:
            raise RequestCancelled(managed.name)
        managed.leases.requests.append(request)

    def share(self, lease: Lease, request: LeaseRequest) -> bool:
        """Let it count on a request in force as well; False if that has ended."""
        with self._dispatcher.lock:
            if self._dispatcher.managed_models.get(request.managed.name) is not request.managed:
                self._check_locked(request.managed)  # in a forked child: the engine is the parent's
            return self._share_locked(lease, request)

    def join(self, lease: Lease, managed: ManagedModel) -> bool:
        """Let it count on the request that has the model now; False if none has."""
        with self._dispatcher.lock:
            self._check_locked(managed)
            # Once the lease of that request has ended, readers must not keep the model from those who wait for it.
            holder = managed.leases.holder
            return holder is not None and not holder.ended and self._share_locked(lease, holder)

    def resumed(self, request: LeaseRequest) -> None:
        """The generator in which the model is leased goes on, maybe in another thread."""
        request.streams = True
        request.site = call_site()
        request.resumed_s = self._clock.now()

    def suspended(self, request: LeaseRequest) -> None:
        """The generator in which the model is leased yields."""
        request.site = request.site.suspended()

    @staticmethod
    def _share_locked(lease: Lease, request: LeaseRequest) -> bool:
        if not request.users:
            return False
        if lease.cancelled:
            raise RequestCancelled(request.managed.name)
        request.users += 1
        lease.request = request
        lease.owns = False
        return True

    def give_back(
        self, lease: Lease, discard: bool = False, error: BaseException | None = None, wait: bool = True
    ) -> None:
        """End a lease; after the last lease of a request, plan the next step. ``discard``: the engine is broken.

        The caller does not wait until the model has left the device, unless the model is small.
        """
        dispatcher = self._dispatcher
        if holds(dispatcher.lock):  # a generator that was in the middle of a request, collected under the lock
            self.give_back_later(lease, discard)
            return
        lost = device_is_lost(error, dispatcher.device)
        with dispatcher.lock:
            now_s = self._clock.now()
            request, lease.request = lease.request, None  # from here to the plan nothing is called: see `Dispatcher`
            if request is None:
                return
            managed = request.managed
            request.users -= 1
            request.ended = request.ended or lease.owns
            if managed.leases.holder is request:
                managed.health.broken = managed.health.broken or discard
                if lost:
                    dispatcher.lost_locked()
                if not request.users:
                    times, wishes = managed.times, managed.wishes
                    times.request_ended_s = times.idle_since_s = now_s
                    times.policy_paused_until_s = -math.inf
                    if wishes.prewarmed and managed.leases.next_request() is None:
                        wishes.prewarmed, wishes.prefetch = False, managed.health.broken
                        times.policy_paused_until_s = now_s + WARM_GRACE_S
                    managed.health.cannot_offload = False
                    managed.leases.holder = None
            if request.users or dispatcher.managed_models.get(managed.name) is not managed:
                return
            if not request.answered:
                self._refuse_locked(request, RequestCancelled(managed.name))
            dispatcher.plan_locked(managed)
            task = managed.move_task
            if request.error is None:
                managed.history.served(request.asked_s, request.served_s, now_s, error)
            else:
                managed.history.refused(request.error)
        leaves = task is not None and not task.arrives and request.error is None
        small = managed.memory.device_bytes <= SMALL_BYTES
        if leaves and not small and dispatcher.monitor.alive:
            return  # the monitor starts it: a thread that moves bytes would delay the answer of this one
        dispatcher.act()
        if wait and leaves and small:
            dispatcher.watch(managed, lambda: managed.move_task is not task, SMALL_LEAVES_WITHIN_S)

    def give_back_async(self, lease: Lease, discard: bool = False, error: BaseException | None = None) -> None:
        """End it in an event loop, which nothing may block."""
        if may_be_device_loss(error):
            self.give_back_later(lease, discard, error)  # the device is asked
        else:
            self.give_back(lease, discard, error, wait=False)

    def give_back_later(self, lease: Lease, discard: bool = False, error: BaseException | None = None) -> None:
        """Let another thread end it: the monitor, or the next that calls `Dispatcher.act`. May be called anywhere."""
        self._dispatcher.deferred_releases.append(partial(self.give_back, lease, discard, error, wait=False))
        self._dispatcher.monitor.wake()

    def look_again(self) -> None:
        """After an interrupt: let the monitor finish the change."""
        self._dispatcher.monitor.wake()

    def cancel(self, request: LeaseRequest) -> bool:
        """Refuse a request that waits; False if it was answered already."""
        return self._refuse(request, RequestCancelled(request.managed.name))

    def place(self, request: LeaseRequest) -> int | None:
        """0 holds the model, 1 is served next; None if it has ended."""
        with self._dispatcher.lock:
            if request.managed.leases.holder is request:
                return 0
            waiting = list(request.managed.leases.waiting())
            return waiting.index(request) + 1 if request in waiting else None

    def _refuse(self, request: LeaseRequest, error: ResidencyError) -> bool:
        with self._dispatcher.replanning(request.managed), self._dispatcher.lock:
            if request.answered:
                return False
            self._refuse_locked(request, error)
            return True

    def _refuse_locked(self, request: LeaseRequest, error: ResidencyError) -> None:
        request.answer(error)
        with suppress(ValueError):  # one that was made and never queued
            request.managed.leases.requests.remove(request)
        self._dispatcher.notifier.tell_queue(request.managed)

    def _refusal_locked(self, request: LeaseRequest, timeout_s: float | None, blocks: bool) -> Exception | None:
        """Why a request is not queued."""
        managed = request.managed
        if (
            managed.settled_state is State.DEVICE
            and managed.move_task is None
            and not managed.leases.in_use
            and not managed.health.broken
        ):
            return None
        if timeout_s != 0 and (error := self.deadlocks.found_at_arrival_locked(request, blocks)) is not None:
            return error
        if timeout_s != 0 and (managed.leases.max_waiting == math.inf or not managed.leases.in_use):
            return None
        waiting = sum(1 for _ in managed.leases.waiting())
        if timeout_s != 0 and waiting < managed.leases.max_waiting:
            return None
        return ModelBusy(managed.name, waiting, managed.state.value, managed.leases.held_by(request.asked_s))

    def _looks(self, request: LeaseRequest, timeout_s: float | None, lease: Lease, blocks: bool) -> Iterator[float]:
        """Yields how many seconds to sleep until the request is answered. In between ends it at its time-out, and
        when it waits for itself."""
        managed, asked_s = request.managed, request.asked_s
        until_s = limit_s = asked_s + (self._wait_timeout_s if timeout_s is None else timeout_s)
        look_s, report_s, reported = asked_s + FIRST_LOOK_S, asked_s + REPORT_AFTER_S, False
        with self._dispatcher.lock:
            arrived_before_s = managed.arrived_for_s(asked_s)
            self._dispatcher.notifier.tell_queue(managed)
            managed.notify_watchers()
        while not request.answered:
            now_s = self._clock.now()
            if timeout_s is None:
                with self._dispatcher.lock:
                    until_s = limit_s + managed.arrived_for_s(now_s) - arrived_before_s
            if lease.cancelled:
                self.cancel(request)
            elif now_s >= until_s:
                self._refuse(request, self._timeout(request, now_s))
            if now_s >= look_s and not request.answered:
                self._end_deadlock(request, lease, blocks)
                look_s = now_s + min(max(now_s - asked_s, FIRST_LOOK_S), LONGEST_PAUSE_S)
                if request.awaited and not reported:
                    report_s, reported = now_s, True  # at once: nothing will happen before a time-out
            if now_s >= report_s and not request.answered and (facts := managed.leases.held_by(now_s)) is not None:
                logger.warning(
                    "%s: a request has waited for %.3g s; the model is %s", managed.name, now_s - asked_s, facts.en
                )
                report_s = math.inf
            if not request.answered:
                yield min(until_s, look_s) - now_s

    def _timeout(self, request: LeaseRequest, now_s: float) -> RequestTimeout:
        managed, waited_s = request.managed, now_s - request.asked_s
        with self._dispatcher.lock:
            place = self.place(request) or 0  # 0: it got the model just now, and is not refused
            return RequestTimeout(managed.name, waited_s, place, managed.state.value, managed.leases.held_by(now_s))

    def _end_deadlock(self, request: LeaseRequest, lease: Lease, blocks: bool) -> None:
        """Serve or refuse a request that turns out to wait for the code that makes it."""
        managed, dispatcher = request.managed, self._dispatcher
        holder = managed.leases.holder
        if holder is None or not holder.users:
            return
        shares = self.deadlocks.same_flow(holder, request.site, lease)
        if not shares:
            if not self.deadlocks.found_while_waiting(holder, request, blocks):
                return
            dispatcher.release_lost_leases()
        with dispatcher.replanning(managed), dispatcher.lock:
            if request.answered or managed.leases.holder is not holder or not holder.users:
                return
            if not shares:
                self._refuse_locked(request, self.deadlocks.error(request))
            elif self._share_locked(lease, holder):
                request.answer()
                managed.leases.requests.remove(request)
                dispatcher.notifier.tell_queue(managed)
                managed.notify_watchers()
