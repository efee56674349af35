"""The dispatcher: holds the state of all models under one lock, and plans their moves.

Changes are planned under the lock (`planner`), carried out by `MoveRunner` without it, and committed under it again.

Lock order: ``MoveRunner._starting``, then ``Dispatcher.lock``. Under the lock nothing waits, and no resident, device,
loader or listener is called. Methods that end in ``_locked`` need the lock.

Interrupts: Ctrl-C can occur at every call in the main thread, also at the first instruction of a Python ``__exit__``.
So only the lock's own ``with``, which is C code, takes and releases it. State for which others wait changes in one
assignment (``managed.move_task``, ``leases.holder``) or in code without calls. The next change, at the latest by the
monitor, plans what an interrupt has left unplanned.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
import threading
from collections import deque
from collections.abc import Callable

from ..contracts import Clock, Device
from ..errors import DeviceLost, LoadTimeout, OverBudget
from ..locks import new_event, owned_by_this_thread, renewed_in_children
from ..observability.error_classification import in_words
from ..observability.history import DeviceHistory, PastMove
from ..observability.outside_memory import OutsideTracker
from ..progress import Progress
from ..states import Move, State
from ..status_types import MoveOutcome
from .managed_model import ManagedModel
from .monitor import IdleMonitor, LostLeases
from .mover import STUCK_AFTER_S, MoveTask
from .notifier import Notifier
from .planner import Serve, by_arrival, next_deadline, next_step, over_budget, room_for

logger = logging.getLogger(__name__)

WARM_GRACE_S = 60.0
"""Minimum stay on the device after `warm`, or after the requests of a model warmed in use, before keep-warm applies."""

RETRY_AFTER_S = 30.0
"""Pause of the policy after a failed move. Requests and manual control may retry at once."""


class _Replanning:
    """See `Dispatcher.replanning`."""

    __slots__ = ("_dispatcher", "_managed")

    def __init__(self, dispatcher: Dispatcher, managed: ManagedModel) -> None:
        self._dispatcher = dispatcher
        self._managed = managed

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info: object) -> None:
        dispatcher, managed = self._dispatcher, self._managed
        with dispatcher.lock:
            if dispatcher.managed_models.get(managed.name) is managed:  # not in a forked child
                dispatcher.plan_locked(managed)
        dispatcher.run_pending()


class Dispatcher:
    """Plans the moves of all models, and grants the models to their requests."""

    def __init__(self, device: Device, clock: Clock, budget_bytes: float = math.inf) -> None:
        self.device = device
        self.clock = clock
        total_bytes = device.memory().total_bytes
        self.budget_bytes = min(budget_bytes, total_bytes or math.inf) if device.separate else math.inf
        self.version = 0  # incremented at each change
        self.changes = 0  # number of begun and ended moves
        self.device_lost: DeviceLost | None = None  # permanent for this process
        # Reentrant: garbage collection, at any point, may end a lost lease, which needs the lock.
        self.lock = renewed_in_children(threading.RLock())
        #: Releases of leases that ended where waiting is forbidden, such as in a finalizer.
        self.deferred_releases: deque[Callable[[], None]] = deque()
        self.managed_models: dict[str, ManagedModel] = {}
        self.device_history = DeviceHistory()
        context_bytes: int = getattr(device, "context_bytes", 0)  # of a simulated card
        self.outside = OutsideTracker(device.kind == "cuda", device.torch_device != "cpu", context_bytes)
        self.notifier = Notifier(device, clock)
        self.monitor = IdleMonitor(self.lock, clock, self._look_locked, self._act_for_monitor)
        self.lost_leases = LostLeases(clock)
        #: Whether begun moves have no thread yet; ``start_moves`` starts them (see `MoveRunner`).
        self.begun = False
        self.start_moves: Callable[[], None] = lambda: None

    # -- changes ------------------------------------------------------------------------------------------------

    def replanning(self, managed: ManagedModel) -> _Replanning:
        """Encloses each change of a model's state: ``with dispatcher.replanning(managed), dispatcher.lock:``.

        At its end, also after an error, plans and starts the next steps of this model and of those that wait for room.
        """
        return _Replanning(self, managed)

    def run_pending(self) -> None:
        """Runs deferred releases of leases and starts begun moves. Not under the lock."""
        while self.deferred_releases and not owned_by_this_thread(self.lock):
            with contextlib.suppress(IndexError):  # another thread was first
                self.deferred_releases.popleft()()
        if self.begun:
            self.start_moves()

    def plan_locked(self, managed: ManagedModel) -> None:
        """Begins the next step of this model, and of those that wait for room. `run_pending` starts it."""
        self.version += 1
        now_s = self.clock.now()
        waiting_for_room = []
        for other in self.managed_models.values():  # a comprehension would cost more: this is part of each lease
            if other.memory.waiting_for_room and other is not managed:
                waiting_for_room.append(other)
        for other in by_arrival(waiting_for_room) if waiting_for_room else ():
            self._step_locked(other, now_s)
        self._step_locked(managed, now_s)
        if managed.settled_state is State.DEVICE and managed.move_task is None and managed.leases.holder is None:
            self._keep_budget_locked()
        self.monitor.expect_locked(self._deadline_locked(managed, now_s))

    def begin_locked(self, managed: ManagedModel, move: Move, *, made_room: bool = False) -> MoveTask:
        """Begins a move of a settled model that is not leased; ``made_room``: other models have just left for it."""
        now_s = self.clock.now()
        head = managed.leases.next_request() if move.target is State.DEVICE else None
        progress = Progress(move.via.value, managed.memory.size_bytes or None, self.clock.now)
        context = head.context if head and head.context else contextvars.Context()
        task = MoveTask(managed, move, now_s, managed.engine, managed.resident, progress, context, made_room=made_room)
        if move.via is State.LOADING:
            task.give_up_at_s = now_s + managed.load_timeout_s
        progress.changed = lambda: self._progressed(task)
        managed.move_task = task
        managed.engine = managed.resident = None
        self.begun = True
        self.changes += 1
        managed.wishes.moved_away_by_hand = managed.wishes.pending_move is not None
        if task.arrives:
            managed.history.given_back.note(now_s, 0)
        else:
            managed.wishes.pending_move = None
        self.monitor.expect_locked(now_s)  # starts the move if an interrupt stops this thread before
        managed.notify_watchers()
        return task

    def _progressed(self, task: MoveTask) -> None:
        self.version += 1
        self.notifier.report_progress(task)

    def reset_in_child(self) -> dict[str, ManagedModel]:
        """In a forked child: removes all models without touching them; returns them, to be kept from collection."""
        self.deferred_releases.clear()
        self.monitor.reset_in_child()
        self.notifier.listeners.reset_in_child()
        managed_models, self.managed_models = self.managed_models, {}
        return managed_models

    # -- waiting ------------------------------------------------------------------------------------------------

    def await_task(self, task: MoveTask) -> None:
        """Waits until a move has ended, with or without an error."""
        self.run_pending()
        self.watch(task.managed, lambda: task.managed.move_task is not task)

    def await_task_while_it_progresses(self, task: MoveTask) -> bool:
        """Waits until a move has ended; returns False if it makes no progress for `STUCK_AFTER_S`."""
        self.run_pending()
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
        """Waits, at most ``timeout_s``, until a condition on this model's state is true; returns whether it is."""
        clock = clock or self.clock
        until_s = clock.now() + timeout_s
        event = new_event()
        while True:
            with self.lock:
                if event in managed.watchers:  # time-out without a change
                    managed.watchers.remove(event)
                if comes_true():
                    return True
                left_s = until_s - clock.now()
                if left_s <= 0:
                    return False
                event = new_event()
                managed.watchers.append(event)
            clock.wait(event, left_s)

    # -- the monitor --------------------------------------------------------------------------------------------

    def _look_locked(self) -> float:
        """Begins due moves; returns the next deadline."""
        now_s = self.clock.now()
        for managed in self.managed_models.values():
            if managed.move_task is not None and now_s >= managed.move_task.give_up_at_s:
                self._give_up_locked(managed)
            self._step_locked(managed, now_s)
            self.lost_leases.look_locked(managed, now_s)
            if managed.move_task is not None and managed.move_task.begins_to_hang(now_s):
                logger.error("%s: hangs on its way off the device; its last request is answered", managed.name)
        tasks = [managed.move_task for managed in self.managed_models.values() if managed.move_task]
        if self.lost_leases.suspected or any(not task.spawned for task in tasks):
            self.begun = True
            return now_s
        if self.deferred_releases:
            return now_s
        deadlines_s = (self._deadline_locked(managed, now_s) for managed in self.managed_models.values())
        return min(deadlines_s, default=math.inf)

    def _act_for_monitor(self) -> None:
        if self.lost_leases.suspected:
            self.lost_leases.collect()
        self.run_pending()

    def release_lost_leases(self) -> None:
        """Releases leases that are reachable only from themselves."""
        self.lost_leases.collect()
        self.run_pending()

    def _deadline_locked(self, managed: ManagedModel, now_s: float) -> float:
        if managed.leases.holder is not None:
            return managed.leases.holder.search_s  # a model in use has no other deadline
        deadline_s = next_deadline(managed, now_s, self.device.separate)
        return deadline_s if managed.move_task is None else min(deadline_s, managed.move_task.check_at_s)

    def _give_up_locked(self, managed: ManagedModel) -> None:
        """Gives up a load that hangs: its thread keeps its resources; the next request starts a new load."""
        logger.error("%s: its loader takes too long and is given up", managed.name)
        now_s, task, error = self.clock.now(), managed.move_task, LoadTimeout(managed.name, managed.load_timeout_s)
        task.given_up = True
        self.outside.given_up(task)
        self.notifier.report("failed", task, error)
        managed.times.arriving_s = managed.arrived_for_s(now_s)
        managed.move_task = None
        self.note_locked(task, "failed", now_s)
        self.refuse_arrival_locked(managed, error)
        self.plan_locked(managed)

    # -- steps --------------------------------------------------------------------------------------------------

    def _step_locked(self, managed: ManagedModel, now_s: float) -> None:
        leases = managed.leases
        if leases.holder is not None and not leases.holder.users:
            leases.holder = None  # its release was interrupted
        had_to_wait, managed.memory.waiting_for_room = managed.memory.waiting_for_room, False
        step = next_step(managed, now_s, self.device.separate)
        if step is Serve.HEAD:
            self.serve_locked(managed, now_s)
        elif isinstance(step, Move):
            if step.target is not State.DEVICE or self._has_room_locked(managed):
                self.begin_locked(managed, step, made_room=had_to_wait)
        elif not leases.in_use and managed.move_task is None:
            managed.wishes.pending_move = None

    def serve_locked(self, managed: ManagedModel, now_s: float) -> None:
        """Grants the model to its next request."""
        request = managed.grant(now_s)
        if request.event is not None:  # it has waited
            self.notifier.report_queue(managed)

    def _has_room_locked(self, managed: ManagedModel) -> bool:
        """Returns whether the model may move to the device now. Begins evictions; refuses hopeless requests."""
        room = room_for(managed, self.managed_models.values(), self.budget_bytes)
        if room.hopeless and managed.memory.shortfall_bytes:
            # The device, not the budget, was full, and no other model can leave: retry.
            managed.memory.shortfall_bytes = 0
            room = room_for(managed, self.managed_models.values(), self.budget_bytes)
        if room.hopeless and managed.leases.next_request() is None and not managed.wishes.prefetch:
            # A return planned by the policy alone evicts no model.
            managed.times.policy_paused_until_s = self.clock.now() + RETRY_AFTER_S
            return False
        if room.hopeless:
            others = [other for other in self.managed_models.values() if other is not managed and other.on_device]
            free_bytes = max(0, int(self.budget_bytes) - sum(other.memory.size_bytes for other in others))
            error = OverBudget(managed.memory.size_bytes, free_bytes, int(self.budget_bytes), self.device.name)
            self.refuse_arrival_locked(managed, error)
            return False
        for move in room.evict:
            self.begin_locked(self.managed_models[move.model], move)
        managed.memory.waiting_for_room = room.wait
        return not room.wait

    def _keep_budget_locked(self) -> None:
        if self.budget_bytes == math.inf:
            return
        for move in over_budget(self.managed_models.values(), self.budget_bytes):
            self.begin_locked(self.managed_models[move.model], move)

    # -- results of moves ---------------------------------------------------------------------------------------

    def settled_locked(self, managed: ManagedModel) -> None:
        """After a move: grants the model to its waiting request before another thread can begin the next move."""
        if (
            managed.settled_state is State.DEVICE
            and managed.leases.next_request() is not None
            and not (managed.faults.broken or managed.wishes.retiring)
        ):
            self.serve_locked(managed, self.clock.now())
        self._release_if_ended_locked(managed)
        self._keep_budget_locked()
        self.plan_locked(managed)
        managed.notify_watchers()

    def engine_ended(self, managed: ManagedModel) -> None:
        """Releases a model whose engine has ended with its process, after its current request; callable anywhere."""
        with self.replanning(managed), self.lock:
            self._release_if_ended_locked(managed)

    def _release_if_ended_locked(self, managed: ManagedModel) -> None:
        if not getattr(managed.resident, "usable", True) and managed.leases.holder is None:
            managed.faults.broken, managed.wishes.pending_move = True, State.RELEASED

    def refuse_arrival_locked(self, managed: ManagedModel, error: BaseException) -> None:
        """Refuses all requests that wait for a model's arrival; the next request tries again."""
        managed.faults.last_error = in_words(error)
        managed.times.policy_paused_until_s = self.clock.now() + RETRY_AFTER_S
        managed.wishes.prefetch = managed.wishes.prewarmed = managed.memory.waiting_for_room = False
        managed.memory.shortfall_bytes = managed.memory.needed_bytes = 0
        managed.leases.refuse_all(error)
        self.notifier.report_queue(managed)
        managed.notify_watchers()

    def note_locked(self, task: MoveTask, outcome: MoveOutcome, now_s: float) -> None:
        """Adds a move that has ended to the history."""
        past = PastMove(now_s, task.move, task.moved_bytes, now_s - task.started_s, outcome)
        managed, memory = task.managed, task.managed.memory
        managed.history.moved(past, memory.device_bytes if self.device.separate else memory.host_bytes)
        if outcome == "ok":
            managed.last_move = past
        managed.history.given_back.note(now_s, memory.size_bytes - memory.device_bytes if managed.last_move else 0)

    def mark_broken_locked(self) -> None:
        """Marks engines on the device as broken after its failure, so that they are rebuilt."""
        for managed in self.managed_models.values():
            managed.faults.broken = managed.faults.broken or managed.settled_state is State.DEVICE
        self.monitor.expect_locked(self.clock.now())
