"""Queues requests, waits for their turn, and grants and ends leases. Used by `Lease`."""

from __future__ import annotations

import contextvars
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from ..errors import ModelBusy, RequestCancelled, RequestTimeout, ResidencyError
from ..locks import AsyncOneShotEvent, new_event, owned_by_this_thread
from ..observability.error_classification import device_is_lost, may_be_device_loss
from ..states import State
from .callers import call_site
from .deadlocks import DeadlockDetector
from .dispatcher import WARM_GRACE_S, Dispatcher
from .held import LeaseData, held_models
from .managed_model import LeaseRequest, ManagedModel

logger = logging.getLogger(__name__)


FIRST_LOOK_S, LONGEST_PAUSE_S = 0.05, 8.0
"""Delay of a waiting request's first deadlock check, and the longest of the growing intervals between later ones."""

REPORT_AFTER_S = 30.0
"""Waiting time after which a request is logged."""

SMALL_BYTES, SMALL_LEAVES_WITHIN_S = 64 << 20, 0.25
"""Maximum wait at the end of a lease for the offload of a model of at most ``SMALL_BYTES``."""


class Admission:
    """Grants each model to one request at a time, in order of arrival. ``check_locked`` raises if a model takes none.

    ``wait_timeout_s``: default limit of a request's wait for its turn and for room, excluding the move to the device.
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
        self.wake_monitor = dispatcher.monitor.wake

    def acquire(self, managed: ManagedModel, timeout_s: float | None, lease: LeaseData) -> LeaseRequest:
        """Waits for its turn and for the model's arrival; returns the request that holds the model, or has an error."""
        request = self._request(managed, timeout_s, lease, blocks=True)
        if not request.answered:
            event = request.event = new_event()
            for pause_s in self._pauses(request, timeout_s, lease, blocks=True):
                self._clock.wait(event, pause_s)
        return request

    async def acquire_async(self, managed: ManagedModel, timeout_s: float | None, lease: LeaseData) -> LeaseRequest:
        """Does the same in a coroutine, without blocking a thread."""
        request = self._request(managed, timeout_s, lease, blocks=False)
        if not request.answered:
            event = request.event = AsyncOneShotEvent()
            for pause_s in self._pauses(request, timeout_s, lease, blocks=False):
                await event.wait(pause_s)
        return request

    def _request(self, managed: ManagedModel, timeout_s: float | None, lease: LeaseData, blocks: bool) -> LeaseRequest:
        """Returns the current request that the lease shares, or a new one. ``blocks``: its thread waits for it."""
        dispatcher, site = self._dispatcher, call_site(lease.made_at)
        failed = None if getattr(managed.resident, "usable", True) else managed.resident
        for may_be_lost in (True, False):
            with dispatcher.replanning(managed), dispatcher.lock:
                self._check_locked(managed)
                now_s = self._clock.now()
                holder = managed.leases.holder
                if (
                    holder is not None
                    and timeout_s != 0  # 0 requires a model that is not in use
                    and self.deadlocks.same_flow(holder, site, lease)
                    and self._share_locked(lease, holder)
                ):
                    return holder
                holding = (*held_models(), *self.deadlocks.kept_busy_locked(site, lease.made_after))
                request = LeaseRequest(
                    managed, next(self._numbers), site, holding, now_s, keep_warm_s=lease.keep_warm_s
                )
                error = self._refusal_locked(request, timeout_s, blocks)
                if error is None:
                    if failed is not None and failed is managed.resident and not managed.leases.in_use:
                        # A worker process ended since the last request.
                        managed.faults.broken = managed.faults.broken or managed.settled_state is not State.RELEASED
                    self._queue_locked(request, lease)
                elif isinstance(error, ModelBusy) or not may_be_lost:
                    managed.history.refused(error)
                    try:
                        raise error
                    finally:
                        del error  # it would keep this frame, and those below it
            if error is None:
                break
            dispatcher.release_lost_leases()  # a deadlock, unless it waits for a lost lease: then the retry succeeds
        if lease.queued:
            lease.queued()
        return request

    def _queue_locked(self, request: LeaseRequest, lease: LeaseData) -> None:
        managed = request.managed
        if managed.times.request_ended_s is not None and not managed.leases.in_use:
            managed.policy.idle_ended(max(0.0, request.asked_s - managed.times.request_ended_s))
            managed.times.request_ended_s = None  # learned once, even if this request fails
        request.context = contextvars.copy_context()
        lease.request = request
        lease.owns = True
        if lease.cancelled:
            raise RequestCancelled(managed.name)
        managed.leases.requests.append(request)

    def share(self, lease: LeaseData, request: LeaseRequest) -> bool:
        """Adds the lease to a current request; returns False if that has ended."""
        with self._dispatcher.lock:
            if self._dispatcher.managed_models.get(request.managed.name) is not request.managed:
                self._check_locked(request.managed)  # raises in a forked child: the engine belongs to the parent
            return self._share_locked(lease, request)

    def join(self, lease: LeaseData, managed: ManagedModel) -> bool:
        """Adds the lease to the request that holds the model; returns False if none does."""
        with self._dispatcher.lock:
            self._check_locked(managed)
            # After the end of the request's own lease, further readers must not delay waiting requests.
            holder = managed.leases.holder
            return holder is not None and not holder.ended and self._share_locked(lease, holder)

    def resumed(self, request: LeaseRequest) -> None:
        """Records that the generator with the lease continues, possibly in another thread."""
        request.streams = True
        request.site = call_site()
        request.resumed_s = self._clock.now()

    def _share_locked(self, lease: LeaseData, request: LeaseRequest) -> bool:
        if not request.users:
            return False
        if lease.cancelled:
            raise RequestCancelled(request.managed.name)
        request.users += 1
        if lease.keep_warm_s is not None and not lease.reading:
            request.managed.asked_warm_s = max(lease.keep_warm_s, request.managed.asked_warm_s or 0.0)
            self._dispatcher.version += 1
        lease.request, lease.waited = request, request.waited
        lease.owns = False
        return True

    def give_back(
        self, lease: LeaseData, discard: bool = False, error: BaseException | None = None, wait: bool = True
    ) -> None:
        """Ends a lease; after the last lease of a request, plans the next step. ``discard``: the engine is broken.

        Does not wait for the model's offload, unless the model is small.
        """
        dispatcher = self._dispatcher
        if owned_by_this_thread(dispatcher.lock):  # a generator with a lease was collected under the lock
            self.give_back_later(lease, discard)
            return
        lost = device_is_lost(error, dispatcher.device)
        discard = discard or (error is not None and _is_unusable(lease.request))
        with dispatcher.lock:
            now_s = self._clock.now()
            request, lease.request = lease.request, None  # interrupts: see `dispatcher`
            if request is None:
                return
            managed = request.managed
            request.users -= 1
            request.ended = request.ended or lease.owns
            if managed.leases.holder is request:
                managed.faults.broken = managed.faults.broken or discard
                if lost:
                    dispatcher.mark_broken_locked()
                if not request.users:
                    times, wishes = managed.times, managed.wishes
                    times.request_ended_s = times.idle_since_s = now_s
                    times.policy_paused_until_s = -math.inf
                    if wishes.prewarmed and managed.leases.next_request() is None:
                        wishes.prewarmed, wishes.prefetch = False, managed.faults.broken
                        times.policy_paused_until_s = now_s + WARM_GRACE_S
                    managed.faults.cannot_offload = False
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
            return  # the monitor starts the move, which would delay this thread's result
        dispatcher.run_pending()
        if wait and leaves and small:
            dispatcher.watch(managed, lambda: managed.move_task is not task, SMALL_LEAVES_WITHIN_S)

    def give_back_async(self, lease: LeaseData, discard: bool = False, error: BaseException | None = None) -> None:
        """Ends a lease in an event loop, without blocking it."""
        if may_be_device_loss(error):
            self.give_back_later(lease, discard, error)  # testing the device takes time
        else:
            self.give_back(lease, discard, error, wait=False)

    def give_back_later(self, lease: LeaseData, discard: bool = False, error: BaseException | None = None) -> None:
        """Defers the end of a lease to the monitor or the next `Dispatcher.run_pending`. Callable anywhere."""
        self._dispatcher.deferred_releases.append(partial(self.give_back, lease, discard, error, wait=False))
        self.wake_monitor()

    def cancel(self, request: LeaseRequest) -> bool:
        """Refuses a waiting request; returns False if it was already answered."""
        return self._refuse(request, RequestCancelled(request.managed.name))

    def place(self, request: LeaseRequest) -> int | None:
        """Returns 0 for the request that holds the model, 1 for the next one; None if it has ended."""
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
        with suppress(ValueError):  # it was not queued
            request.managed.leases.requests.remove(request)
        self._dispatcher.notifier.report_queue(request.managed)

    def _refusal_locked(self, request: LeaseRequest, timeout_s: float | None, blocks: bool) -> Exception | None:
        """Returns why a request cannot be queued, or None."""
        managed = request.managed
        leases = managed.leases
        settled = managed.settled_state is State.DEVICE and managed.move_task is None
        if settled and not leases.in_use and not managed.faults.broken:
            return None
        if timeout_s != 0:
            if (error := self.deadlocks.found_at_arrival_locked(request, blocks)) is not None:
                return error
            if not leases.in_use or leases.max_waiting == math.inf or leases.count_waiting() < leases.max_waiting:
                return None
        return ModelBusy(managed.name, leases.count_waiting(), managed.state.value, leases.held_by(request.asked_s))

    def _pauses(
        self, request: LeaseRequest, timeout_s: float | None, lease: LeaseData, blocks: bool
    ) -> Iterator[float]:
        """Yields the seconds to sleep until the request is answered; ends it at its time-out or at a deadlock."""
        managed, asked_s = request.managed, request.asked_s
        until_s = limit_s = asked_s + (self._wait_timeout_s if timeout_s is None else timeout_s)
        look_s, report_s, reported = asked_s + FIRST_LOOK_S, asked_s + REPORT_AFTER_S, False
        with self._dispatcher.lock:
            arrived_before_s = managed.arrived_for_s(asked_s)
            self._dispatcher.notifier.report_queue(managed)
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
                    report_s, reported = now_s, True  # at once: nothing changes before a time-out
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
            place = self.place(request) or 0  # 0: it has just got the model, and is not refused
            card = (managed.move_task and managed.move_task.waits) or ""
            holder = managed.leases.held_by(now_s)
            return RequestTimeout(managed.name, waited_s, place, managed.state.value, holder, card)

    def _end_deadlock(self, request: LeaseRequest, lease: LeaseData, blocks: bool) -> None:
        """Serves or refuses a request if it waits for the code that makes it."""
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
                dispatcher.notifier.report_queue(managed)
                managed.notify_watchers()


def _is_unusable(request: LeaseRequest | None) -> bool:
    """Returns whether only a new engine can serve further requests: a worker process of the engine has ended."""
    return request is not None and not getattr(request.managed.resident, "usable", True)
