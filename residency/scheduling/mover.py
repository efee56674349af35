"""Loads, offloads, restores and releases engines. Uses no locks and no other models."""

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

from ..contracts import Device
from ..memory import Resident, SnapshotFolder
from ..progress import Progress
from ..random_state import preserved_random_state
from ..sentences import Sentence
from ..states import Move, State
from .managed_model import ManagedModel

logger = logging.getLogger(__name__)

Adopt = Callable[[Any, Device, ManagedModel], Resident]
"""Finds the parts of a fresh engine that hold memory, except for the borrowed part; see `residency.memory.adopt`."""

SKELETON_BYTES = 64 << 20
"""Maximum of unmanaged memory of an engine that stays as a skeleton while its weights are in a snapshot."""


STUCK_AFTER_S = 30.0
"""Time without progress after which a model that leaves the device counts as hanging."""


@dataclass(eq=False)
class MoveTask:
    """A running move: one thread carries it out, and owns the model's engine and resident until it ends.

    Attributes:
        context: the context in which it runs.
        give_up_at_s: time limit of its loader.
        made_room: other models left for it.
        spawned, claimed: its thread was started; has begun.
        put_off: it failed, and will be tried again once there is room.
        reported_s, reported_phase: time and phase of the last progress report to listeners.
        waits: what it waits for before it begins: room that other processes use; None: it does not wait.
        pulse: its progress at the last `begins_to_hang`, at ``checked_s``.
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
    spawned: bool = False
    claimed: bool = False
    retries: int = 0
    changes_seen: int = 0
    put_off: bool = False
    given_up: bool = False
    reported_s: float = -math.inf
    reported_phase: str = ""
    waits: Sentence | None = None
    pulse: object = None
    checked_s: float = 0.0
    device_bytes_before: int = 0
    hangs: bool = False
    moved_bytes: int = 0
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.checked_s, self.device_bytes_before = self.started_s, self.managed.memory.device_bytes

    @property
    def arrives(self) -> bool:
        return self.move.target is State.DEVICE

    @property
    def check_at_s(self) -> float:
        """When to call `begins_to_hang`; only models that leave are checked, since they occupy memory."""
        return math.inf if self.arrives or self.hangs else self.checked_s + STUCK_AFTER_S

    def begins_to_hang(self, now_s: float) -> bool:
        """Returns True once: at the first check that finds no progress for `STUCK_AFTER_S`."""
        if now_s < self.check_at_s:
            return False
        before, self.pulse, self.checked_s = self.pulse, self.progress.pulse, now_s
        self.hangs = self.pulse == before
        return self.hangs

    def end(self) -> None:
        """Drops references to objects that must not outlive the move: the engine, and the task itself."""
        self.engine = self.resident = self.progress.changed = None

    @property
    def back_at(self) -> State:
        """The model's state after a failure: the one before, unless its bytes had already left the device."""
        if self.engine is None:
            return State.RELEASED
        # The memory of a worker process that ended does not count as moved: the rest must be released.
        has_left = (
            self.resident is not None
            and self.resident.device_bytes < self.device_bytes_before
            and getattr(self.resident, "usable", True)
        )
        return State.HOST if self.move.via is State.OFFLOADING and has_left else self.move.source


class Mover:
    """Carries out moves on one device.

    With ``snapshots``, a release keeps the engine as a skeleton and its weights on disk, and the next load reads them;
    if that fails, the engine is rebuilt.

    Moves set engine and resident of their task; they only read the managed model.
    """

    def __init__(self, device: Device, adopt: Adopt, snapshots: SnapshotFolder | None = None) -> None:
        self._device = device
        self._adopt = adopt
        # If device and host share their memory, a skeleton would keep everything in it.
        self._snapshots = snapshots if device.separate else None

    def carry_out(self, task: MoveTask) -> int:
        """Carries out the move and returns the bytes moved; after an error the engine is where it was before."""
        if task.move.via is State.LOADING:
            return self._wake(task) or self._load(task)
        if task.move.via is State.RELEASING:
            return self._sleep(task) or self.forget(task)
        assert task.resident is not None, "a model on device or host has a resident"
        return task.resident.restore() if task.arrives else task.resident.offload()

    def forget(self, holder: MoveTask | ManagedModel) -> int:
        """Releases an engine and drops all references to it; returns the bytes freed."""
        alive = _watched(holder.engine)
        resident, holder.engine, holder.resident = holder.resident, None, None
        freed_bytes = resident.release() if resident else 0
        del resident
        if alive() is not None:
            gc.collect()  # only if the engine is in a cycle, since it stops all threads for a moment
        self._device.settle()
        return freed_bytes

    def throw_away(self, task: MoveTask) -> None:
        """Releases the engine of a load that was given up; another engine may have its borrowed part by now."""
        logger.warning("%s: loaded after its time limit; the engine is discarded", task.managed.name)
        resident, task.engine, task.resident = task.resident, None, None
        if resident is not None:
            resident.release()
        del resident
        self.tidy()

    def tidy(self) -> None:
        """Collects garbage and empties the allocator's caches."""
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
                    return 0  # the next load may already have the part
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
        """Releases into a snapshot; returns 0 if there is none."""
        managed, name, outside = task.managed, task.managed.name, task.managed.memory.outside
        if self._snapshots is None or task.resident is None or managed.wishes.retiring or managed.faults.broken:
            return 0
        if outside is not None and outside.held_bytes > SKELETON_BYTES:
            held = f"{outside.held_bytes:,}"
            logger.info("%s: released without a snapshot: its engine holds %s bytes that no move frees", name, held)
            return 0
        try:
            freed_bytes = task.resident.save(self._snapshots, name)
            self._device.settle()
        except BaseException as error:
            # After any error: the memory is needed.
            logger.warning("%s: released without a snapshot. %s", name, error)
            return 0
        return freed_bytes

    def _wake(self, task: MoveTask) -> int:
        """Loads from a snapshot; returns 0 if the engine must be built."""
        resident = task.resident
        if resident is None or self._snapshots is None:
            return 0
        try:
            resident.load(self._snapshots, task.managed.name)
        except BaseException as error:
            # After any error: the loader can still build the engine.
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
    """Returns a weak reference to the engine; if it supports none, a function that returns True."""
    try:
        return weakref.ref(engine)
    except TypeError:
        there = None if engine is None else True
        return lambda: there


def _build(managed: ManagedModel, progress: Progress) -> Any:
    progress.enter("building")
    with preserved_random_state():
        if managed.random_state is not None:
            managed.random_state.put_back()  # the same random numbers at each load
        engine = managed.load()
    if engine is None:
        raise TypeError(f"The loader of {managed.name!r} returned None; let it return the engine.")
    return engine
