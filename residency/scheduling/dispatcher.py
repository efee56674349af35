"""The dispatcher: all models' books under one lock, and the threads that move models.

A change is planned under the lock (`residency.scheduling.planner` decides), carried out in a thread of its own outside
of it, and committed or rolled back under the lock again. Nothing that may take long happens while the lock is held.

Lock order: the dispatcher's lock comes after ``_spawning``; no resident, device, loader or listener is called under it.
An interrupt (Ctrl-C) can come wherever the main thread calls something. So state that others wait for changes where
nothing is called, or in one assignment (``managed.move_task``, ``managed.holder``), and what should follow it is
found again by whoever plans next, at the latest by the monitor.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
import threading
from collections import deque
from collections.abc import Callable

from ..contracts import Clock, Device, Memory
from ..errors import DeviceLost, LoadTimeout, OverBudget
from ..observability.error_classification import (
    empty_frames,
    in_words,
    is_capture_under_way,
    is_out_of_device_memory,
    lacking_bytes,
    loss_beyond_repair,
    may_be_device_loss,
)
from ..observability.history import CardHistory, PastMove
from ..observability.outside_memory import NO_SAMPLE, MemorySample, OutsideBooks
from ..one_shot_event import holds, new_event
from ..progress import Progress, reporting
from ..states import Move, MoveRecord, State
from ..status_types import MoveOutcome
from .lease import loading
from .lost_leases import LostLeases
from .managed_model import ManagedModel
from .monitor import IdleMonitor
from .mover import Mover, MoveTask
from .notifier import Notifier
from .planner import Serve, by_arrival, next_deadline, next_step, over_budget, room_for

logger = logging.getLogger(__name__)

WARM_GRACE_S = 60.0
"""How long a model that was warmed by hand, or during a request, waits for the next one before keep-warm counts."""

RETRY_AFTER_S = 30.0
"""How long after a failed move the monitor tries again. Requests and people may try at once."""

FREED_WITHIN_S = 2.0
"""How long a move waits at most until memory that others have just left is shown as free."""

STUCK_AFTER_S = 30.0
"""How long a model that is leaving may stand still before nobody waits for it any more."""

CAPTURE_WITHIN_S = 30.0
"""How long a move waits at most for the end of captures of CUDA graphs, during which nobody may wait for the card."""

OUT_OF_MEMORY_RETRIES = 5
"""How often a move to a full device is tried again at most, while other models come and go."""


class Dispatcher:
    """Methods that end in ``_locked`` want ``lock``; call `act` after releasing it, to start what they began."""

    def __init__(
        self,
        device: Device,
        mover: Mover,
        clock: Clock,
        budget_bytes: float = math.inf,
        sample: Callable[[bool, bool], MemorySample] = lambda trim, look_at_children: NO_SAMPLE,
    ) -> None:
        self.device = device
        self.mover = mover
        self.clock = clock
        self.sample = sample
        self.outside = OutsideBooks(device.kind == "cuda", device.torch_device != "cpu")
        total_bytes = device.memory().total_bytes
        self.budget_bytes = min(budget_bytes, total_bytes or math.inf) if device.separate else math.inf
        self.version = 0  # is another number whenever the books have changed
        self.device_lost: DeviceLost | None = None  # for good: this process can use it no more
        # Both can be met again by a thread that has them: Python collects at any point, and runs what it finds there.
        self.lock, self._spawning = threading.RLock(), threading.RLock()
        self.left: deque[Callable[[], None]] = deque()  # leases that ended where nothing could be done about it
        self.managed_models: dict[str, ManagedModel] = {}
        self.card = CardHistory()
        self.reports = Notifier(device, clock)
        self.monitor = IdleMonitor(self.lock, clock, self._look_locked, self._act_for_monitor)
        self._begun = False
        self.lost = LostLeases(clock)
        self._threads: dict[MoveTask, threading.Thread] = {}
        self._changes = 0  # how many moves have begun or ended

    # -- planning -----------------------------------------------------------------------------------------------

    def plan_locked(self, managed: ManagedModel) -> None:
        """Let happen what is next for this model, and for those that wait for room."""
        self.version += 1
        now_s = self.clock.now()
        if short := [
            other for other in self.managed_models.values() if other.waiting_for_room and other is not managed
        ]:
            for other in by_arrival(short):
                self._step_locked(other, now_s)
        self._step_locked(managed, now_s)
        if managed.settled_state is State.DEVICE and managed.move_task is None and managed.holder is None:
            self._keep_budget_locked()
        self.monitor.expect_locked(self._deadline_locked(managed, now_s))

    def begin_locked(self, managed: ManagedModel, move: Move, *, made_room: bool = False) -> MoveTask:
        """Begin a move of a settled model that nobody holds; ``made_room``: others have just left for it."""
        now_s = self.clock.now()
        head = managed.next_request() if move.target is State.DEVICE else None
        task = MoveTask(
            managed,
            move,
            now_s,
            managed.engine,
            managed.resident,
            Progress(move.via.value, managed.size_bytes or None, self.clock.now),
            head.context if head and head.context else contextvars.Context(),
            give_up_at_s=now_s + managed.load_timeout_s if move.via is State.LOADING else math.inf,
            made_room=made_room,
            device_bytes_before=managed.device_bytes,
            seen_s=now_s,
        )
        task.progress.changed = lambda: self._progressed(task)
        managed.move_task = task
        managed.engine = managed.resident = None
        self._begun = True
        self._changes += 1
        managed.moved_away_by_hand = managed.pending_move is not None
        if not task.arrives:
            managed.pending_move = None
        self.monitor.expect_locked(now_s)  # in case that who begins it does not come to start it
        managed.notify_watchers()
        return task

    def _progressed(self, task: MoveTask) -> None:
        self.version += 1
        self.reports.tell_progress(task)

    def act(self) -> None:
        """Start what was begun. A thread that cannot be had is done without."""
        while self.left and not holds(self.lock):
            with contextlib.suppress(IndexError):  # another thread was first
                self.left.popleft()()
        if not self._begun:
            return
        with self._spawning:
            with self.lock:
                self._begun = False
                tasks = [
                    managed.move_task
                    for managed in self.managed_models.values()
                    if managed.move_task and not managed.move_task.spawned
                ]
            left = [task for task in tasks if not self._spawn(task)]
        for task in left:
            self._run(task)

    def _act_for_monitor(self) -> None:
        if self.lost.suspected:
            self.lost.collect()
        self.act()

    def give_lost_back(self) -> None:
        """Give leases back that nothing refers to but themselves."""
        self.lost.collect()
        self.act()

    def leave(self) -> dict[str, ManagedModel]:
        """For a forked child: forget all models without touching them; returns them, to be kept from collection."""
        self.lock, self._spawning = threading.RLock(), threading.RLock()
        self.left.clear()
        self.monitor.leave()
        self.reports.listeners.leave()
        managed_models, self.managed_models = self.managed_models, {}
        return managed_models

    def await_task(self, task: MoveTask) -> None:
        """Wait until a move has ended, one way or the other."""
        self.act()
        self.watch(task.managed, lambda: task.managed.move_task is not task)

    def await_task_that_goes_on(self, task: MoveTask) -> bool:
        """Wait until a move has ended; False if it stands still for `STUCK_AFTER_S`."""
        self.act()
        while True:
            before = task.progress.pulse
            if self.watch(task.managed, lambda: task.managed.move_task is not task, STUCK_AFTER_S):
                return True
            if task.progress.pulse == before:
                return False

    def watch(
        self,
        managed: ManagedModel,
        comes_true: Callable[[], bool],
        timeout_s: float = math.inf,
        clock: Clock | None = None,
    ) -> bool:
        """Wait until something is true of this model's books, ``timeout_s`` at most; False if it is not."""
        clock = clock or self.clock
        until_s = clock.now() + timeout_s
        latch = new_event()
        while True:
            with self.lock:
                if latch in managed.watchers:  # the time is over, and no change
                    managed.watchers.remove(latch)
                if comes_true():
                    return True
                left_s = until_s - clock.now()
                if left_s <= 0:
                    return False
                latch = new_event()
                managed.watchers.append(latch)
            clock.wait(latch, left_s)

    def join(self) -> None:
        """Wait for the threads of moves that are over; they have nothing left to do."""
        moving = [managed.move_task for managed in self.managed_models.values()]
        for task, thread in list(self._threads.items()):
            if task not in moving and not task.given_up and thread is not threading.current_thread():
                with contextlib.suppress(RuntimeError):  # its start was interrupted
                    thread.join()

    def _look_locked(self) -> float:
        """For the monitor: begin what is due, and say when to look again."""
        now_s = self.clock.now()
        for managed in self.managed_models.values():
            if managed.move_task is not None and now_s >= managed.move_task.give_up_at_s:
                self._give_up_locked(managed)
            self._step_locked(managed, now_s)
            self.lost.look_locked(managed, now_s)
            self._tell_of_standstill_locked(managed, now_s)
        if self.lost.suspected or any(
            managed.move_task and not managed.move_task.spawned for managed in self.managed_models.values()
        ):
            self._begun = True
            return now_s
        if self.left:
            return now_s
        return min(
            (self._deadline_locked(managed, now_s) for managed in self.managed_models.values()), default=math.inf
        )

    def _deadline_locked(self, managed: ManagedModel, now_s: float) -> float:
        if managed.holder is not None:
            return managed.holder.search_s  # nothing else happens to a model in use
        deadline_s = next_deadline(managed, now_s, self.device.separate)
        task = managed.move_task
        if task is not None and not task.arrives and not task.hangs:
            return min(deadline_s, float(task.seen_s) + STUCK_AFTER_S)
        return deadline_s

    def _tell_of_standstill_locked(self, managed: ManagedModel, now_s: float) -> None:
        """Log once that a model which leaves does not make progress: its memory stays taken."""
        task = managed.move_task
        if task is None or task.arrives or task.hangs or now_s < task.seen_s + STUCK_AFTER_S:
            return
        before, task.seen, task.seen_s = task.seen, task.progress.pulse, now_s
        task.hangs = task.seen == before
        if task.hangs:
            logger.error("%s: hangs on its way off the device; its last request is answered", managed.name)

    def _step_locked(self, managed: ManagedModel, now_s: float) -> None:
        if managed.holder is not None and not managed.holder.users:
            managed.holder = None  # who left it was interrupted
        had_to_wait, managed.waiting_for_room = managed.waiting_for_room, False
        step = next_step(managed, now_s, self.device.separate)
        if step is Serve.HEAD:
            self._serve_locked(managed, now_s)
        elif isinstance(step, Move):
            if step.target is not State.DEVICE or self._has_room_locked(managed):
                self.begin_locked(managed, step, made_room=had_to_wait)
        elif not managed.in_use and managed.move_task is None:
            managed.pending_move = None

    def _serve_locked(self, managed: ManagedModel, now_s: float) -> None:
        request = managed.next_request()
        assert request is not None
        request.served_s = request.resumed_s = request.searched_s = now_s
        managed.holder = request
        request.answer()
        if request.latch is not None:  # it has waited
            self.reports.tell_queue(managed)

    def _has_room_locked(self, managed: ManagedModel) -> bool:
        """Whether the model may go to the device now. Begins evictions; refuses who would wait for ever."""
        room = room_for(managed, self.managed_models.values(), self.budget_bytes)
        if room.hopeless and managed.shortfall_bytes:
            # What was lacking was the device's word, not the budget's: nobody is left to wait for, so try again.
            managed.shortfall_bytes = 0
            room = room_for(managed, self.managed_models.values(), self.budget_bytes)
        if room.hopeless and managed.next_request() is None and not managed.prefetch:
            managed.policy_paused_until_s = (
                self.clock.now() + RETRY_AFTER_S
            )  # its policy's idea, for which nobody is moved
            return False
        if room.hopeless:
            stay_bytes = sum(
                other.size_bytes for other in self.managed_models.values() if other is not managed and other.on_device
            )
            free_bytes = max(0, int(self.budget_bytes) - stay_bytes)
            error = OverBudget(managed.size_bytes, free_bytes, int(self.budget_bytes), self.device.name)
            self._refuse_arrival_locked(managed, error)
            return False
        for move in room.evict:
            self.begin_locked(self.managed_models[move.model], move)
        managed.waiting_for_room = room.wait
        return not room.wait

    def _keep_budget_locked(self) -> None:
        if self.budget_bytes == math.inf:
            return
        for move in over_budget(self.managed_models.values(), self.budget_bytes):
            self.begin_locked(self.managed_models[move.model], move)

    def _refuse_arrival_locked(self, managed: ManagedModel, error: BaseException) -> None:
        """Everybody who waits for a model to come gets the error; the next request tries again."""
        managed.last_error = in_words(error)
        managed.policy_paused_until_s = self.clock.now() + RETRY_AFTER_S
        managed.prefetch = managed.prewarmed = managed.waiting_for_room = False
        managed.shortfall_bytes = managed.needed_bytes = 0
        for request in list(managed.waiting()):
            request.answer(error)
        self.reports.tell_queue(managed)
        managed.notify_watchers()

    def is_lost(self, error: BaseException | None) -> bool:
        """Whether the device has failed, by an error that says so or, if one gives reason to ask, by its own answer.

        It may take seconds: not to be called under the lock.
        """
        if error is None:
            return False
        return loss_beyond_repair(error) is not None or (may_be_device_loss(error) and not self.device.is_usable())

    def lost_locked(self) -> None:
        """The device has failed: what lies on it is of no use, and is built anew."""
        for managed in self.managed_models.values():
            managed.broken = managed.broken or managed.settled_state is State.DEVICE
        self.monitor.expect_locked(self.clock.now())

    # -- moving -------------------------------------------------------------------------------------------------

    def _spawn(self, task: MoveTask) -> bool:
        name = f"gpu-{task.move.via.value}-{task.managed.name}"
        try:
            thread = self._threads[task] = threading.Thread(target=self._run, args=(task,), name=name, daemon=True)
            thread.start()
        except RuntimeError:
            return False  # the system gives no more threads, or the interpreter is ending
        task.spawned = True
        return True

    def _run(self, task: MoveTask) -> None:
        loads = task.move.via is State.LOADING
        before = self.sample(loads, loads)
        with self.lock:
            if task.claimed:
                return
            task.spawned = task.claimed = True
            books = task.managed.device_bytes, task.managed.host_bytes
            builds = loads and task.engine is None  # and does not come from a snapshot
            self.outside.began(task, before, books, self._all_books_locked(), builds)
            self.reports.tell("began", task)
        while True:
            try:
                task.context.run(self._carry_out, task)
                break
            except BaseException as error:
                task.error = error
                empty_frames(error)  # those who waited keep the error, and not what the attempt has made
            if is_capture_under_way(task.error) and self._await_capture(task):
                continue
            full = task.arrives and is_out_of_device_memory(task.error)
            if not (full and self._try_again(task)):
                break
        self._commit(task)
        self._threads.pop(task, None)

    def _carry_out(self, task: MoveTask) -> None:
        with reporting(task.progress), loading(task.managed):
            if task.made_room:
                self._await_freed(task.managed)
            task.moved_bytes = self.mover.carry_out(task)

    def _await_freed(self, managed: ManagedModel) -> None:
        """Drivers show memory as free a moment after it was given back."""
        until_s = self.clock.now() + FREED_WITHIN_S
        while self.clock.now() < until_s:
            free_bytes = self.device.memory().free_bytes
            if free_bytes is None or free_bytes >= (managed.size_bytes or managed.needed_bytes):
                return
            self.clock.wait(new_event(), 0.02)

    def _await_capture(self, task: MoveTask) -> bool:
        """Wait a moment for the end of a capture that was in the way; False if that has been done for long enough."""
        if task.given_up or self.clock.now() >= task.started_s + CAPTURE_WITHIN_S:
            return False
        self.clock.wait(new_event(), 0.1)
        task.error = None
        return True

    def _try_again(self, task: MoveTask) -> bool:
        """After the device was full: once more with emptied caches, if there is no model that could leave for it.

        More often while other models came or went meanwhile: then it may have been them.
        """
        managed = task.managed
        with self.lock:
            if managed.move_task is not task:
                return False  # given up meanwhile
            managed.shortfall_bytes = lacking_bytes(task.error)
            task.put_off = not room_for(managed, self.managed_models.values(), self.budget_bytes).hopeless
            if not task.put_off:
                managed.shortfall_bytes = 0
                if task.retries == OUT_OF_MEMORY_RETRIES or (task.retries and task.changes_seen == self._changes):
                    return False
                task.changes_seen = self._changes
        try:
            self.mover.tidy()
        except Exception as error:
            task.error, task.put_off = error, False
            return False
        if task.put_off:
            memory = self.device.memory()
            with self.lock:
                needed_bytes = (memory.free_bytes or 0) + managed.shortfall_bytes
                managed.needed_bytes = min(needed_bytes, memory.total_bytes or needed_bytes)
            return False
        task.retries, task.error = task.retries + 1, None
        return True

    def _commit(self, task: MoveTask) -> None:
        managed, error = task.managed, task.error
        left, memory, after = (
            task.resident or managed.borrowed_part,
            Memory(),
            self.sample(task.move.via is State.LOADING, True),
        )
        lost = self.is_lost(error)
        sizes = (left.device_bytes, left.host_bytes) if left else (0, 0)
        with contextlib.suppress(Exception):  # whatever becomes of a line in the log, the books are kept
            memory = self.device.memory()
            if managed.move_task is task:
                self.reports.log(task)  # before anybody goes on who waited for it
            if sizes[0] > self.budget_bytes:
                self.reports.warn_of_budget(task, self.budget_bytes)
        with self.lock:
            now_s = self.clock.now()
            self._changes += 1
            self.card.seen(now_s, memory)
            wanted = managed.move_task is task
            if wanted:
                managed.device_bytes, managed.host_bytes = sizes
                managed.restored_for_s = managed.arrived_for_s(now_s)
            loaded = frozenset(
                name
                for name, other in self.managed_models.items()
                if other.settled_state is not State.RELEASED or other.move_task
            )
            found = self.outside.ended(
                task,
                managed.name,
                after,
                sizes,
                self._all_books_locked(),
                loaded,
                getattr(task.resident, "array_bytes", 0),
                arrived=(task.back_at if error else task.move.target) is State.DEVICE,
                released=task.resident is None,
            )
            if wanted:
                managed.engine, managed.resident = task.engine, task.resident
                if error is None:
                    self._arrived_locked(task, now_s)
                else:
                    self._failed_locked(task, error, lost)
                managed.outside_memory = found
                self.reports.tell_outside(task)
                self.reports.tell("failed" if error else "done", task)
                self._note_locked(task, "postponed" if task.put_off else "failed" if error else "ok", now_s)
                managed.move_task = None
                task.end()
                self._after_locked(managed)
        if not wanted:
            with contextlib.suppress(Exception):  # of a device that is gone
                self.mover.throw_away(task)
        self.act()

    def _all_books_locked(self) -> tuple[int, int]:
        managed_models = self.managed_models.values()
        return sum(managed.device_bytes for managed in managed_models), sum(
            managed.host_bytes for managed in managed_models
        )

    def _arrived_locked(self, task: MoveTask, now_s: float) -> None:
        managed = task.managed
        managed.settled_state = task.move.target
        managed.last_move = MoveRecord(task.move, task.moved_bytes, now_s - task.started_s)
        managed.last_error = None
        managed.cannot_offload = False
        if managed.settled_state is State.RELEASED:
            managed.broken = False
        if task.arrives:
            managed.size_bytes, managed.shortfall_bytes = managed.device_bytes, 0
            if managed.prefetch or managed.idle_since_s is None or task.move.via is State.LOADING:
                managed.idle_since_s = now_s
            managed.policy_paused_until_s = now_s + WARM_GRACE_S if managed.prefetch else -math.inf
            managed.prefetch = False
            if task.move.via is State.RESTORING:
                managed.policy.brought_back(managed.last_move.seconds)
        else:
            for other in self.managed_models.values():
                other.shortfall_bytes = max(0, other.shortfall_bytes - managed.size_bytes)

    def _failed_locked(self, task: MoveTask, error: BaseException, lost: bool) -> None:
        managed, move = task.managed, task.move
        managed.settled_state = task.back_at
        managed.last_error = in_words(error)
        managed.policy_paused_until_s = self.clock.now() + RETRY_AFTER_S
        managed.cannot_offload = not task.arrives
        # What cannot come back, or is on a device that is gone, is built anew.
        ephemeral = isinstance(error, MemoryError) or is_out_of_device_memory(error) or is_capture_under_way(error)
        gone = lost or (move.via is State.RESTORING and not ephemeral)
        managed.broken = managed.settled_state is not State.RELEASED and (managed.broken or gone)
        if lost:
            self.lost_locked()
        self.device_lost = self.device_lost or loss_beyond_repair(error)
        if task.arrives and not task.put_off:
            self._refuse_arrival_locked(managed, error)

    def _note_locked(self, task: MoveTask, outcome: MoveOutcome, now_s: float) -> None:
        past = PastMove(now_s, task.move, task.moved_bytes, now_s - task.started_s, outcome)
        task.managed.history.moved(past, task.managed.device_bytes if self.device.separate else task.managed.host_bytes)

    def _after_locked(self, managed: ManagedModel) -> None:
        if (
            managed.settled_state is State.DEVICE
            and managed.next_request() is not None
            and not (managed.broken or managed.closing)
        ):
            # Who waited for it gets it, before anybody can ask for it to leave again.
            self._serve_locked(managed, self.clock.now())
        self._keep_budget_locked()
        self.plan_locked(managed)
        managed.notify_watchers()

    def _give_up_locked(self, managed: ManagedModel) -> None:
        """A loader that hangs keeps its thread, and what it had to work with; the next request starts afresh."""
        logger.error("%s: its loader takes too long and is given up", managed.name)
        task, error = managed.move_task, LoadTimeout(managed.name, managed.load_timeout_s)
        task.given_up = True
        self.outside.given_up(task)
        self.reports.tell("failed", task, error)
        managed.restored_for_s = managed.arrived_for_s(self.clock.now())
        managed.move_task = None
        self._note_locked(task, "failed", self.clock.now())
        self._refuse_arrival_locked(managed, error)
        self.plan_locked(managed)
