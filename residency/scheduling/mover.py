"""Carries out moves: loads, offloads, restores and releases engines. Knows no locks and no other models."""

from __future__ import annotations

import contextvars
import gc
import logging
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from ..contracts import Adopt, Device, Resident, SnapshotStore
from ..progress import Progress
from ..states import Move, State
from .managed_model import ManagedModel
from .random_state import preserved_random_state

logger = logging.getLogger(__name__)

SKELETON_BYTES = 64 << 20
"""Most memory outside the managed weights that an engine may keep while its weights are in a snapshot."""


STUCK_AFTER_S = 30.0
"""How long a model that is leaving may make no progress before it counts as hanging, and waiting for it ends."""


@dataclass(eq=False)
class MoveTask:
    """A move under way: one thread carries it out, and owns the model's engine and resident until it ends.

    ``claimed``: that thread has begun. ``made_room``: other models left for it. ``give_up_at_s``: when its loader has
    taken too long. ``context``: the context in which it runs.
    """

    managed: ManagedModel
    move: Move
    started_s: float
    engine: Any
    resident: Resident | None
    progress: Progress
    context: contextvars.Context
    give_up_at_s: float = math.inf
    made_room: bool = False
    device_bytes_before: int = 0
    spawned: bool = False
    claimed: bool = False
    retries: int = 0
    changes_seen: int = 0
    put_off: bool = False
    given_up: bool = False
    told_s: float = -math.inf
    #: Its progress when `begins_to_hang` last looked, and when.
    seen: object = None
    seen_s: float = -math.inf
    hangs: bool = False
    moved_bytes: int = 0
    error: BaseException | None = None

    @property
    def arrives(self) -> bool:
        return self.move.target is State.DEVICE

    @property
    def check_at_s(self) -> float:
        """When to call `begins_to_hang`: a model that leaves and makes no progress keeps its memory taken."""
        return math.inf if self.arrives or self.hangs else self.seen_s + STUCK_AFTER_S

    def begins_to_hang(self, now_s: float) -> bool:
        """Whether it is found now, for the first time, to have made no progress for `STUCK_AFTER_S`."""
        if now_s < self.check_at_s:
            return False
        before, self.seen, self.seen_s = self.seen, self.progress.pulse, now_s
        self.hangs = self.seen == before
        return self.hangs

    def end(self) -> None:
        """Drop references to objects that must not outlive the move: the engine, and the task itself."""
        self.engine = self.resident = self.progress.changed = None

    @property
    def back_at(self) -> State:
        """The model's state after a failure: the one before, unless its bytes had left already."""
        if self.engine is None:
            return State.RELEASED
        has_left = self.resident is not None and self.resident.device_bytes < self.device_bytes_before
        return State.HOST if self.move.via is State.OFFLOADING and has_left else self.move.source


class Mover:
    """Carries out moves on one device. ``adopt`` finds the parts of a fresh engine that hold memory.

    With ``snapshots``, a release keeps the engine as a skeleton and its weights on disk, and the next load reads
    them back instead of building the engine again; if that does not work the engine is built the normal way.

    What a move makes of engine and resident it writes into its task; the managed model is only read.
    """

    def __init__(self, device: Device, adopt: Adopt, snapshots: SnapshotStore | None = None) -> None:
        self._device = device
        self._adopt = adopt
        # Where nothing leaves the device, a skeleton would keep everything in memory.
        self._snapshots = snapshots if device.separate else None

    def carry_out(self, task: MoveTask) -> int:
        """Do the move and return the bytes that changed place; on an error the engine is where it was before."""
        if task.move.via is State.LOADING:
            return self._wake(task) or self._load(task)
        if task.move.via is State.RELEASING:
            return self._sleep(task) or self.forget(task)
        assert task.resident is not None, "a model on device or host has a resident"
        return task.resident.restore() if task.arrives else task.resident.offload()

    def forget(self, holder: MoveTask | ManagedModel) -> int:
        """Give up an engine altogether; return the bytes freed."""
        alive = _watched(holder.engine)
        resident, holder.engine, holder.resident = holder.resident, None, None
        freed_bytes = resident.release() if resident else 0
        del resident
        if alive() is not None:
            gc.collect()  # it is part of a cycle; this stops all threads for a moment, so only then
        self._device.settle()
        return freed_bytes

    def throw_away(self, task: MoveTask) -> None:
        """Release the engine of a load that was given up; its borrowed part may belong to another engine by now."""
        logger.warning("%s: came after it had been given up, and is thrown away", task.managed.name)
        resident, task.engine, task.resident = task.resident, None, None
        if resident is not None:
            resident.release()
        del resident
        self.tidy()

    def hand_back(self, managed: ManagedModel) -> None:
        """Put the part that the loader was given where it was when it was given, once the model is gone."""
        if managed.borrowed_part is not None:
            managed.borrowed_part.hand_back()

    def tidy(self) -> None:
        """Free garbage and the caches of the allocator."""
        gc.collect()
        self._device.settle()

    def _load(self, task: MoveTask) -> int:
        managed, loan = task.managed, None
        if task.given_up:
            return 0
        self._device.ensure_usable()
        if managed.borrowed_part is not None:
            with managed.borrowed_part.lock:
                if task.given_up:
                    return 0  # the next load may have it already
                loan = managed.borrowed_part.borrow_locked()
        try:
            if loan is not None:
                loan.restore()
            engine = _build(managed, task.progress)
            with managed.borrowed_part.lock if managed.borrowed_part is not None else nullcontext():
                resident = self._adopt(engine, self._device, managed)
        except BaseException:
            if loan is not None:
                loan.offload()
            raise
        task.engine, task.resident = engine, loan.joined_with(resident) if loan else resident
        return task.resident.device_bytes + task.resident.host_bytes

    def _sleep(self, task: MoveTask) -> int:
        """Release into a snapshot; 0 if there is none."""
        if (
            self._snapshots is None
            or task.resident is None
            or task.managed.health.closing
            or task.managed.health.broken
        ):
            return 0
        if task.managed.memory.outside is not None and task.managed.memory.outside.held_bytes > SKELETON_BYTES:
            logger.info(
                "%s: released without a snapshot, since its engine holds %s bytes that no move takes with it",
                task.managed.name,
                f"{task.managed.memory.outside.held_bytes:,}",
            )
            return 0
        try:
            freed_bytes = task.resident.save(self._snapshots, task.managed.name)
            self._device.settle()
        except BaseException as error:
            # Whatever it is: somebody wants the memory.
            logger.warning("%s: released without a snapshot. %s", task.managed.name, error)
            return 0
        return freed_bytes

    def _wake(self, task: MoveTask) -> int:
        """Load from a snapshot; 0 if the engine has to be built."""
        resident = task.resident
        if resident is None or self._snapshots is None:
            return 0
        try:
            resident.load(self._snapshots, task.managed.name)
        except BaseException as error:
            # Whatever it is: the loader can still build the engine.
            logger.warning("%s: loaded without its snapshot. %s", task.managed.name, error)
            self.forget(task)
            return 0
        if task.given_up:
            return resident.host_bytes
        try:
            return resident.restore()
        except BaseException:
            if not self._sleep(task):
                self.forget(task)
            raise


def _watched(engine: Any) -> Callable[[], Any]:
    """A weak reference to the engine; where there can be none, a function that answers True."""
    try:
        return weakref.ref(engine)
    except TypeError:
        there = None if engine is None else True
        return lambda: there


def _build(managed: ManagedModel, progress: Progress) -> Any:
    progress.enter("building")
    with preserved_random_state():
        if managed.random_state is not None:
            managed.random_state.put_back()  # each load draws the same numbers
        engine = managed.load()
    if engine is None:
        raise TypeError(f"The loader of {managed.name!r} returned None; let it return the engine.")
    return engine
