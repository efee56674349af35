"""Runs moves: each in its own thread, without the lock, then committed or rolled back under it."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from ..arrivals import Arrival, CardShare, NoRoomNow, room_for_retry
from ..contracts import InWorker, Memory
from ..errors import WorkerEnded
from ..locks import new_event, renewed_in_children
from ..observability.error_classification import (
    device_is_lost,
    empty_frames,
    in_words,
    is_capture_under_way,
    is_out_of_device_memory,
    loss_beyond_repair,
    shortfall_bytes,
)
from ..observability.outside_memory import MemorySample
from ..progress import reporting
from ..sentences import Sentence
from ..states import State
from .dispatcher import RETRY_AFTER_S, WARM_GRACE_S, Dispatcher
from .held import loading
from .managed_model import ManagedModel
from .mover import Mover, MoveTask
from .planner import room_for

FREED_WITHIN_S = 2.0
"""Maximum wait of a move until memory just released by other models is reported as free."""

CAPTURE_WITHIN_S = 30.0
"""Maximum wait of a move for the end of CUDA graph captures, during which waiting for the device is forbidden."""

OUT_OF_MEMORY_RETRIES = 5
"""Maximum number of retries of a move to a full device, while other models come and go."""


class MoveRunner:
    """Starts the moves begun by the dispatcher. ``sample(trim, look_at_children)`` measures the process.

    ``share``: grants room on a card that other processes use too.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        mover: Mover,
        sample: Callable[[bool, bool], MemorySample],
        share: CardShare | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._device, self._clock = dispatcher.device, dispatcher.clock
        self._mover = mover
        self._sample = sample
        self._share = share
        # Reentrant, like the dispatcher's lock.
        self._starting = renewed_in_children(threading.RLock())
        self._threads: dict[MoveTask, threading.Thread] = {}
        dispatcher.start_moves = self._start

    def join(self) -> None:
        """Joins the threads of moves that have ended."""
        moving = [managed.move_task for managed in self._dispatcher.managed_models.values()]
        for task, thread in list(self._threads.items()):
            if task not in moving and not task.given_up and thread is not threading.current_thread():
                with contextlib.suppress(RuntimeError):  # its start was interrupted
                    thread.join()

    def _start(self) -> None:
        """Starts begun moves. If no thread can be started, runs them inline."""
        dispatcher = self._dispatcher
        with self._starting:
            with dispatcher.lock:
                dispatcher.begun = False
                tasks = [managed.move_task for managed in dispatcher.managed_models.values() if managed.move_task]
            inline = [task for task in tasks if not task.spawned and not self._spawn(task)]
        for task in inline:
            self._run(task)

    def _spawn(self, task: MoveTask) -> bool:
        name = f"gpu-{task.move.via.value}-{task.managed.name}"
        try:
            thread = self._threads[task] = threading.Thread(target=self._run, args=(task,), name=name, daemon=True)
            thread.start()
        except RuntimeError:
            return False  # no more threads, or the interpreter is ending
        task.spawned = True
        return True

    def _run(self, task: MoveTask) -> None:
        dispatcher, managed = self._dispatcher, task.managed
        loads = task.move.via is State.LOADING
        before = self._sample(loads, loads)
        with dispatcher.lock:
            if task.claimed:
                return
            task.spawned = task.claimed = True
            recorded = managed.memory.device_bytes, managed.memory.host_bytes
            builds = loads and task.engine is None  # not from a snapshot
            dispatcher.outside.began(task, before, recorded, self._all_bytes_locked(), builds)
            dispatcher.notifier.report("began", task)
        with self._place(task) as claim:
            while not self._attempt(task, claim):
                pass
        self._commit(task)
        self._threads.pop(task, None)

    def _attempt(self, task: MoveTask, claim: Callable[[int], None] | None) -> bool:
        """Carries out a move; returns False if it must be tried again: then the task has no error."""
        try:
            task.context.run(self._carry_out, task, claim)
            return True
        except BaseException as error:
            task.error = error
            empty_frames(error)  # requests keep the error, but must not keep the objects of the attempt
        if isinstance(task.error, NoRoomNow):
            task.put_off = True
            return True
        if is_capture_under_way(task.error):
            return not self._await_capture(task)
        return not (task.arrives and is_out_of_device_memory(task.error) and self._try_again(task))

    def _carry_out(self, task: MoveTask, claim: Callable[[int], None] | None) -> None:
        memory = task.managed.memory
        with reporting(task.progress), loading(task.managed):
            if claim is not None:
                claim(max(memory.size_bytes, memory.needed_bytes))
                if task.waits is not None:
                    self._begins_after_wait(task)
            if task.made_room:
                self._await_freed(task.managed)
            task.moved_bytes = self._mover.carry_out(task)

    def _place(self, task: MoveTask) -> AbstractContextManager[Callable[[int], None] | None]:
        """Returns the context of a move to a shared card; see `CardShare.place`."""
        dispatcher, managed = self._dispatcher, task.managed
        if self._share is None or not task.arrives:
            return contextlib.nullcontext()

        def is_wanted() -> bool:
            with dispatcher.lock:
                return managed.move_task is task and managed.leases.next_request() is not None

        def waits(needed_bytes: int, reason: Sentence) -> None:
            if task.waits is None:
                task.progress.enter("waiting", needed_bytes or None)
            task.waits, task.give_up_at_s = reason, math.inf

        with dispatcher.lock:
            request = managed.leases.next_request()
        asked_s = None if request is None else request.asked_s
        return self._share.place(Arrival(managed.name, asked_s, is_wanted, waits))

    def _begins_after_wait(self, task: MoveTask) -> None:
        with self._dispatcher.replanning(task.managed), self._dispatcher.lock:
            task.waits, task.started_s = None, self._clock.now()
            if task.move.via is State.LOADING:
                task.give_up_at_s = task.started_s + task.managed.load_timeout_s
        task.progress.enter(task.move.via.value, task.managed.memory.size_bytes or None)

    def _await_freed(self, managed: ManagedModel) -> None:
        """Waits for released memory, which drivers report as free with a delay."""
        until_s = self._clock.now() + FREED_WITHIN_S
        while self._clock.now() < until_s:
            free_bytes = self._device.memory().free_bytes
            if free_bytes is None or free_bytes >= max(managed.memory.size_bytes, managed.memory.needed_bytes):
                return
            self._clock.wait(new_event(), 0.02)

    def _await_capture(self, task: MoveTask) -> bool:
        """Waits a moment for the end of a capture; returns False after `CAPTURE_WITHIN_S`."""
        if task.given_up or self._clock.now() >= task.started_s + CAPTURE_WITHIN_S:
            return False
        self._clock.wait(new_event(), 0.1)
        task.error = None
        return True

    def _try_again(self, task: MoveTask) -> bool:
        """Empties caches after an out-of-memory error; returns True for one retry if no other model can leave.

        More retries follow if other models came or went in between, since they may have been the cause. On a shared
        card each waits for more room than the one before, as long as other processes hold a part of the card.
        """
        dispatcher, managed = self._dispatcher, task.managed
        with dispatcher.lock:
            if managed.move_task is not task:
                return False  # given up
            short_bytes = managed.memory.shortfall_bytes = shortfall_bytes(task.error)
            room = room_for(managed, dispatcher.managed_models.values(), dispatcher.budget_bytes)
            task.put_off = not room.hopeless
            if not task.put_off:
                managed.memory.shortfall_bytes = 0
                unchanged = task.changes_seen == dispatcher.changes
                if self._share is None and (task.retries == OUT_OF_MEMORY_RETRIES or (task.retries and unchanged)):
                    return False
                task.changes_seen = dispatcher.changes
            offloaded = [] if task.put_off else [
                other.resident for other in dispatcher.managed_models.values()
                if other.settled_state is State.HOST and other.is_idle()
            ]  # fmt: skip
        try:
            for resident in offloaded:
                if isinstance(resident, InWorker):
                    resident.leave_device()
            self._mover.tidy()
        except Exception as error:
            task.error, task.put_off = error, False
            return False
        if task.put_off or self._share is not None:
            memory = self._device.memory()
            needed_bytes: int | None = (memory.free_bytes or 0) + short_bytes
            if not task.put_off:
                needed_bytes = room_for_retry(memory, self._own_bytes(managed, memory), short_bytes, task.retries)
            if needed_bytes is None:
                return False
            with dispatcher.lock:
                managed.memory.needed_bytes = min(needed_bytes, memory.total_bytes or needed_bytes)
        if task.put_off:
            return False
        task.retries, task.error = task.retries + 1, None
        return True

    def _own_bytes(self, arriving: ManagedModel, memory: Memory) -> int:
        """Returns the bytes that this process and its other models hold."""
        with self._dispatcher.lock:
            others = [each for each in self._dispatcher.managed_models.values() if each is not arriving]
            return max(memory.process_bytes or 0, sum(other.memory.device_bytes for other in others))

    # -- the end of a move --------------------------------------------------------------------------------------

    def _commit(self, task: MoveTask) -> None:
        dispatcher, managed = self._dispatcher, task.managed
        left, memory = task.resident or managed.borrowed_part, Memory()
        after = self._sample(task.move.via is State.LOADING, True)
        lost = device_is_lost(task.error, self._device)
        sizes = (left.device_bytes, left.host_bytes) if left else (0, 0)
        with contextlib.suppress(Exception):  # the move must end even if logging fails
            memory = self._device.memory()
            if managed.move_task is task:
                dispatcher.notifier.log(task)  # before waiting threads continue
            if sizes[0] > dispatcher.budget_bytes:
                dispatcher.notifier.warn_of_budget(task, dispatcher.budget_bytes)
        with dispatcher.lock:
            dispatcher.changes += 1
            dispatcher.device_history.note(self._clock.now(), memory)
            wanted = self._settle_locked(task, sizes, after, lost)
        if not wanted:
            with contextlib.suppress(Exception):  # errors of a lost device
                self._mover.throw_away(task)
        dispatcher.run_pending()

    def _settle_locked(self, task: MoveTask, sizes: tuple[int, int], after: MemorySample, lost: bool) -> bool:
        """Commits the move or rolls it back; if it was given up, only records its memory and returns False."""
        dispatcher, managed, error, now_s = self._dispatcher, task.managed, task.error, self._clock.now()
        wanted = managed.move_task is task
        if wanted:
            managed.memory.device_bytes, managed.memory.host_bytes = sizes
            managed.times.arriving_s = managed.arrived_for_s(now_s)
        others = dispatcher.managed_models.items()
        loaded = frozenset(
            name for name, other in others if other.settled_state is not State.RELEASED or other.move_task
        )
        array_bytes = getattr(task.resident, "array_bytes", 0)
        arrived = (task.back_at if error else task.move.target) is State.DEVICE
        released, totals = task.resident is None, self._all_bytes_locked()
        found = dispatcher.outside.ended(
            task, managed.name, after, sizes, totals, loaded, array_bytes, arrived, released
        )
        if not wanted:
            return False
        managed.engine, managed.resident = task.engine, task.resident
        if error is None:
            self._arrived_locked(task, now_s)
        else:
            self._failed_locked(task, error, lost)
        managed.memory.outside = found
        dispatcher.notifier.warn_of_unmanaged(task)
        dispatcher.notifier.report("failed" if error else "done", task)
        dispatcher.note_locked(task, "postponed" if task.put_off else "failed" if error else "ok", now_s)
        managed.move_task = None
        task.end()
        dispatcher.settled_locked(managed)
        return True

    def _all_bytes_locked(self) -> tuple[int, int]:
        uses = [managed.memory for managed in self._dispatcher.managed_models.values()]
        return sum(use.device_bytes for use in uses), sum(use.host_bytes for use in uses)

    def _arrived_locked(self, task: MoveTask, now_s: float) -> None:
        managed, memory, times = task.managed, task.managed.memory, task.managed.times
        managed.settled_state = task.move.target
        managed.faults.last_error = None
        managed.faults.cannot_offload = False
        if managed.settled_state is State.RELEASED:
            managed.faults.broken = False
        if task.arrives:
            memory.size_bytes, memory.shortfall_bytes, memory.needed_bytes = memory.device_bytes, 0, 0
            managed.asked_warm_s = None
            for request in managed.leases.waiting():
                request.arrival = "load" if task.move.via is State.LOADING else "restore"
                request.arrival_s += now_s - max(task.started_s, request.asked_s)
            if managed.wishes.prefetch or times.idle_since_s is None or task.move.via is State.LOADING:
                times.idle_since_s = now_s
            times.policy_paused_until_s = now_s + WARM_GRACE_S if managed.wishes.prefetch else -math.inf
            managed.wishes.prefetch = False
            if task.move.via is State.RESTORING:
                managed.policy.brought_back(now_s - task.started_s)
        else:
            idle_s = 0.0 if times.idle_since_s is None else now_s - times.idle_since_s
            times.left_after_s = idle_s if idle_s < (managed.asked_warm_s or 0.0) else 0.0
            for other in self._dispatcher.managed_models.values():
                other.memory.shortfall_bytes = max(0, other.memory.shortfall_bytes - memory.size_bytes)

    def _failed_locked(self, task: MoveTask, error: BaseException, lost: bool) -> None:
        dispatcher, managed, faults = self._dispatcher, task.managed, task.managed.faults
        managed.settled_state = task.back_at
        if isinstance(error, NoRoomNow):
            managed.memory.needed_bytes = 0
            if managed.wishes.prefetch:
                faults.last_error = in_words(error)
            managed.wishes.prefetch = managed.wishes.prewarmed = False
            managed.times.policy_paused_until_s = self._clock.now() + RETRY_AFTER_S
            return
        faults.last_error = in_words(error)
        managed.times.policy_paused_until_s = self._clock.now() + RETRY_AFTER_S
        faults.cannot_offload = not task.arrives
        # An engine that cannot be restored, or whose device is lost, is rebuilt.
        ephemeral = isinstance(error, MemoryError) or is_out_of_device_memory(error) or is_capture_under_way(error)
        gone = lost or isinstance(error, WorkerEnded) or (task.move.via is State.RESTORING and not ephemeral)
        faults.broken = managed.settled_state is not State.RELEASED and (faults.broken or gone)
        if lost:
            dispatcher.mark_broken_locked()
        dispatcher.device_lost = dispatcher.device_lost or loss_beyond_repair(error)
        if task.arrives and not task.put_off:
            dispatcher.refuse_arrival_locked(managed, error)
