"""Manual control: offload, release, warm, make room, retire. A model in use is moved after its requests."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable

from ..errors import ResidencyError
from ..observability.error_classification import is_out_of_device_memory
from ..states import State
from .dispatcher import WARM_GRACE_S, Dispatcher
from .managed_model import ManagedModel
from .move_runner import MoveRunner
from .mover import Mover
from .planner import move_towards

logger = logging.getLogger(__name__)


class ManualControl:
    """Moves models on demand. ``check_locked`` raises if a model is no longer managed."""

    def __init__(
        self, dispatcher: Dispatcher, moves: MoveRunner, mover: Mover, check_locked: Callable[[ManagedModel], None]
    ) -> None:
        self._dispatcher = dispatcher
        self._moves = moves
        self._mover = mover
        self._check_locked = check_locked
        self._separate = dispatcher.device.separate

    def bring_down(self, managed: ManagedModel, target: State) -> bool:
        """Offloads (HOST) or releases (RELEASED). Returns True when done; raises the move's error.

        False: the move is pending until the current request, or a running move to the device, has ended. It comes
        before waiting requests, which bring the model back.
        """
        dispatcher, leases, wishes, task = self._dispatcher, managed.leases, managed.wishes, None
        while task is None:
            dispatcher.watch(managed, lambda: leases.in_use or managed.move_task is None or managed.arrives)
            with dispatcher.replanning(managed), dispatcher.lock:
                self._check_locked(managed)
                wishes.prefetch = wishes.prewarmed = False
                if leases.in_use or managed.arrives:
                    if self._separate or target is not State.HOST:
                        wishes.pending_move = State.RELEASED if wishes.pending_move is State.RELEASED else target
                    return target is State.HOST and not self._separate
                if managed.move_task is None:
                    managed.times.policy_paused_until_s = -math.inf  # ends the grace after `warm`
                    move = move_towards(managed, target, self._separate)
                    if move is None:
                        return True
                    wishes.pending_move = target
                    task = dispatcher.begin_locked(managed, move)
        dispatcher.await_task(task)
        if task.error is not None:
            raise task.error
        return True

    def warm(self, managed: ManagedModel, if_idle: bool = False) -> bool:
        """Starts the move to the device, or extends the stay there. Returns whether it is already there.

        For a model in use: extends its stay after the requests, and cancels a pending move; with ``if_idle`` does
        nothing.
        """
        with self._dispatcher.replanning(managed), self._dispatcher.lock:
            self._check_locked(managed)
            there = managed.settled_state is State.DEVICE and managed.move_task is None
            if if_idle and managed.leases.in_use:
                return there
            managed.wishes.pending_move = None
            if managed.leases.in_use:
                managed.wishes.prewarmed = True
            elif there:
                grace_ends_s = self._dispatcher.clock.now() + WARM_GRACE_S
                managed.times.policy_paused_until_s = max(managed.times.policy_paused_until_s, grace_ends_s)
            else:
                managed.wishes.prefetch = True
        return there

    def move_aside(self, managed_models: Iterable[ManagedModel]) -> None:
        """Offloads those of these models that are idle, and empties the device's caches."""
        dispatcher = self._dispatcher
        for managed in managed_models:
            with dispatcher.lock:
                on_device = managed.settled_state is State.DEVICE and managed.is_idle() and not managed.stays
                move = move_towards(managed, State.HOST, self._separate) if on_device else None
                task = dispatcher.begin_locked(managed, move) if move else None
            if task is not None:
                dispatcher.await_task(task)
        self._mover.tidy()

    def retire(self, managed_models: list[ManagedModel], reason: ResidencyError, grace_s: float) -> bool:
        """Refuses waiting requests for these models with ``reason``, waits for running ones, and releases the models.

        Returns False if some still run after ``grace_s``, or hang on their way off the device; these are left alone.
        """
        dispatcher = self._dispatcher
        until_s = dispatcher.clock.now() + grace_s
        with dispatcher.lock:  # all at once, before any of them can continue
            for managed in managed_models:
                managed.wishes.retiring = True
        for managed in managed_models:
            with dispatcher.replanning(managed), dispatcher.lock:
                managed.leases.refuse_all(reason)
                dispatcher.notifier.report_queue(managed)
                managed.notify_watchers()
        gone = []
        for managed in managed_models:
            left_s = until_s - dispatcher.clock.now()
            if dispatcher.watch(managed, managed.is_idle, left_s) or self._leaves(managed):
                try:
                    self._mover.forget(managed)  # the snapshot's skeleton
                except Exception:
                    logger.exception("%s: an error occurred while its memory was freed", managed.name)
                gone.append(managed)
        for managed in gone:  # after all of them have left the device
            self._hand_back(managed)
        self._moves.join()
        return len(gone) == len(managed_models)

    def _leaves(self, managed: ManagedModel) -> bool:
        """Waits for a move off the device, also beyond the grace; returns whether it is released."""
        while managed.leases.holder is None and (task := managed.move_task) is not None and not task.arrives:
            if not self._dispatcher.await_task_while_it_progresses(task):
                return False
        return managed.is_idle()

    def _hand_back(self, managed: ManagedModel) -> None:
        """Restores the borrowed part to the device for its owner; offloads idle models if there is no room."""
        dispatcher, part = self._dispatcher, managed.borrowed_part
        if part is None:
            return
        try:
            try:
                part.hand_back()
            except Exception as error:
                if not is_out_of_device_memory(error):
                    raise
                with dispatcher.lock:
                    others = [other for other in dispatcher.managed_models.values() if other is not managed]
                self.move_aside(others)
                part.hand_back()
        except Exception as error:
            logger.error(
                "%s: the object that was passed to its loader cannot be restored to the device (%s): create a new one "
                "before you use it. / %s：传给加载函数的对象无法回到设备（%s）：使用前请重新创建。",
                managed.name, error, managed.name, error,
            )  # fmt: skip
