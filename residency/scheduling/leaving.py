"""Moves models off the device for other processes; see `residency.sharing.room`."""

from __future__ import annotations

import math
import os

from ..contracts import InWorker
from ..states import State
from .dispatcher import Dispatcher
from .managed_model import ManagedModel
from .planner import move_towards

LONGEST_STAY_S = 10.0
"""Maximum of the minimum stay: a model stays on the device at least as long as its move there took."""


class Leaving:
    """See `residency.sharing.room.Leaving`."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def on_card(self) -> bool:
        with self._dispatcher.lock:
            return any(managed.on_device for managed in self._dispatcher.managed_models.values())

    def own_pids(self) -> set[int]:
        pids = {os.getpid()}
        for resident in self._residents():
            if isinstance(resident, InWorker):
                pids.add(resident.worker.pid)
            pids.update(getattr(resident, "pids", ()))
        return pids

    def count_on_card(self) -> int:
        residents = self._residents()
        workers = [each.worker for each in residents if isinstance(each, InWorker)]
        children = sum(len(getattr(each, "pids", ())) for each in residents)
        if not workers:
            return 1 + children
        running = sum(not (worker.ended or worker.checkpointed) for worker in workers)
        return running + children + residents.count(None)

    def _residents(self) -> list[object]:
        """Returns what the models have loaded, and None for each that loads."""
        with self._dispatcher.lock:
            models = [*self._dispatcher.managed_models.values()]
            moving = [each.move_task.resident for each in models if each.move_task]
            return moving + [each.resident for each in models if not each.move_task and each.resident is not None]

    def offers(self) -> dict[str, tuple[float, int]]:
        with self._dispatcher.lock:
            now_s = self._dispatcher.clock.now()
            return {
                managed.name: (_idle_since_s(managed), managed.memory.size_bytes)
                for managed in self._dispatcher.managed_models.values()
                if managed.settled_state is State.DEVICE
                and (managed.move_task or _leaves_next(managed) or _may_leave(managed, now_s, None))
            }

    def leave(self, nbytes: int, before_s: float | None) -> tuple[dict[str, int], int]:
        dispatcher, leaving = self._dispatcher, dict[str, int]()
        with dispatcher.lock:
            now_s = dispatcher.clock.now()
            there = [each for each in dispatcher.managed_models.values() if each.settled_state is State.DEVICE]
            lacking_bytes = nbytes - sum(each.memory.size_bytes for each in there if each.move_task)
            nbytes = lacking_bytes - sum(each.memory.size_bytes for each in there if each.wishes.pending_move)
            for managed in sorted(there, key=_idle_since_s):
                if nbytes <= 0:
                    break
                if _may_leave(managed, now_s, before_s):
                    nbytes -= managed.memory.size_bytes
                    leaving[managed.name] = managed.memory.size_bytes
                    target = State.RELEASED if managed.faults.cannot_offload else State.HOST
                    if managed.leases.holder is not None:
                        managed.wishes.pending_move = target
                    elif move := move_towards(managed, target, dispatcher.device.separate):
                        dispatcher.begin_locked(managed, move)
                        lacking_bytes -= managed.memory.size_bytes
        dispatcher.run_pending()
        return leaving, max(0, lacking_bytes)


def _leaves_next(managed: ManagedModel) -> bool:
    return managed.wishes.pending_move is not None and managed.leases.holder is None


def _may_leave(managed: ManagedModel, now_s: float, before_s: float | None) -> bool:
    if managed.move_task is not None or managed.wishes.pending_move is not None or managed.stays:
        return False
    arrived = managed.last_move
    if arrived is not None and arrived.move.target is State.DEVICE:
        stays_until_s = arrived.time_s + min(arrived.seconds, LONGEST_STAY_S)
    else:
        stays_until_s = -math.inf
    if now_s < stays_until_s:
        return False
    mine = managed.leases.next_request()
    if before_s is None:
        return not managed.leases.in_use
    return mine is None or mine.asked_s > before_s


def _idle_since_s(managed: ManagedModel) -> float:
    since_s = managed.times.idle_since_s
    return -math.inf if since_s is None else since_s
