"""The manager: models leave the GPU as soon as nobody uses them and return when somebody does.

    manager = get_gpu_manager(idle_timeout=600)
    manager.register("tts", load=build_engine)
    with manager.lease("tts") as engine:      # loaded or restored, and on the device until the block ends
        audio = engine.clone(...)

Every change goes one way: plan under the lock, move outside it, commit or roll back under the lock, notify.
`residency.states` has the states, `residency.planning` decides, this module acts.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from residency.clock import SystemClock
from residency.contracts import Adopt, Clock, Device
from residency.devices import CpuDevice, CudaDevice, SimulatedDevice, find_device
from residency.errors import (
    DeviceOutOfMemory,
    DeviceUnavailable,
    ManagerClosed,
    ModelExists,
    ResidencyError,
    SettingsConflict,
    UnknownModel,
)
from residency.leasing import Lease, held_leases
from residency.moving import Mover
from residency.planning import due_move, move_towards, next_deadline
from residency.policies import FixedPolicy, seconds
from residency.probes import HostProbe
from residency.residents import SnapshotFolder, adopt
from residency.states import Move, MoveRecord, Slot, State
from residency.status import describe

__all__ = [
    "CpuDevice",
    "CudaDevice",
    "DeviceOutOfMemory",
    "DeviceUnavailable",
    "GPUResourceManager",
    "Lease",
    "ManagerClosed",
    "ModelExists",
    "ResidencyError",
    "SettingsConflict",
    "SimulatedDevice",
    "State",
    "UnknownModel",
    "find_device",
    "get_gpu_manager",
]

logger = logging.getLogger(__name__)

WARM_GRACE_S = 60.0
"""How long a model that was warmed by hand waits for its first request before keep-warm counts."""

RETRY_AFTER_S = 30.0
"""How long after a failed move the monitor tries again. Requests and people may try at once."""


class GPUResourceManager:
    """Moves named models between device, host memory and released, and never under a running request.

    ``device=None`` takes the best device found. ``keep_warm`` and ``idle_timeout`` are defaults for `register`:
    seconds or ``"15m"``; -1 is never. With ``snapshot_dir`` released weights are kept on disk there, at most
    ``snapshot_limit_bytes`` of them, and read back instead of loaded. All methods may be called from any thread. Moves
    run outside the lock, so `status` answers at once even while a model loads.
    """

    #: Discovery stops here: an engine may know its manager, but the manager's other models are not of the engine.
    not_of_the_engine = True

    def __init__(
        self,
        device: Device | None = None,
        *,
        keep_warm: float | str = 0,
        idle_timeout: float | str = 600,
        snapshot_dir: str | Path | None = None,
        snapshot_limit_bytes: int | None = None,
        clock: Clock | None = None,
        adopt: Adopt = adopt,
    ) -> None:
        self.policy = FixedPolicy(seconds(keep_warm), seconds(idle_timeout))
        self.device: Device = device or find_device()
        self._clock: Clock = clock or SystemClock()
        self.snapshot_dir = None if snapshot_dir is None else Path(snapshot_dir)
        self.snapshot_limit_bytes = snapshot_limit_bytes
        snapshots = SnapshotFolder(self.snapshot_dir, snapshot_limit_bytes) if self.snapshot_dir else None
        self._mover = Mover(self.device, adopt, snapshots)
        self._host = HostProbe()
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._slots: dict[str, Slot] = {}
        self._closed = False
        self._monitor: threading.Thread | None = None

    def __enter__(self) -> GPUResourceManager:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._closed

    # -- models -------------------------------------------------------------------------------------------------

    def register(
        self,
        name: str,
        load: Callable[[], Any],
        *,
        keep_warm: float | str | None = None,
        idle_timeout: float | str | None = None,
        skip: Collection[str] = (),
        keep: Any = None,
    ) -> None:
        """Put a model under management; ``load`` builds its engine on the first request, and not before.

        ``load`` places the weights on the device itself. What hangs on the attribute paths in ``skip``
        (``.tokenizer``) is left alone. ``keep`` is a part of the engine that ``load`` does not build but is given, and
        that must outlive a release: then it stays in main memory. `ModelExists` if the name is taken.
        """
        policy = FixedPolicy(
            self.policy.keep_warm_s if keep_warm is None else seconds(keep_warm),
            self.policy.idle_timeout_s if idle_timeout is None else seconds(idle_timeout),
        )
        with self._lock:
            if self._closed:
                raise ManagerClosed
            if name in self._slots:
                raise ModelExists(name)
            changed = threading.Condition(self._lock)
            self._slots[name] = Slot(name, load, policy, changed, skip=tuple(skip), keep=keep)
            if self._monitor is None:
                self._monitor = threading.Thread(target=self._watch, name="gpu-idle-monitor", daemon=True)
                self._monitor.start()

    def unregister(self, name: str) -> None:
        """Release a model once its requests have ended and forget it; requests that wait get `UnknownModel`.

        RuntimeError if called by somebody who holds a lease on it.
        """
        slot = self._slots_named(name)[0]
        self._refuse_own("unregister()", (name,))
        self._retire([slot], UnknownModel(name, tuple(other for other in self.names() if other != name)))
        with self._lock:
            if self._slots.get(name) is slot:
                del self._slots[name]

    def names(self) -> tuple[str, ...]:
        """The registered models, in order of registration."""
        with self._lock:
            return tuple(self._slots)

    def lease(self, name: str) -> Lease:
        """A context manager that gives the model's engine, on the device, and takes it back at its end.

        Entering raises what the loader raised (every request that waited for that load gets the same error; the
        next one tries again), `DeviceOutOfMemory`, or `ManagerClosed`.
        """
        return Lease(self, self._slots_named(name)[0])

    # -- steering by hand ---------------------------------------------------------------------------------------

    def offload(self, name: str | None = None) -> bool:
        """Bring a model (None: all) to host memory. True: done; False: it follows the request that is running."""
        return self._ask(name, State.HOST)

    def release(self, name: str | None = None) -> bool:
        """Give up a model's memory (None: all) everywhere. True: done; False: it follows the running request."""
        return self._ask(name, State.RELEASED)

    def warm(self, name: str | None = None) -> bool:
        """Begin to bring a model (None: all) to the device and return at once. True: it is there already.

        Without a request within `WARM_GRACE_S` it leaves again as after any request. A failure is logged and
        shown in `status`; the next request tries again.
        """
        warm = True
        for slot in self._slots_named(name):
            with self._lock:
                self._check_open_locked(slot)
                if slot.state is State.DEVICE:
                    continue
                begun = any(lease.prefetch for lease in slot.queue)
            warm = False
            if not begun:
                lease = Lease(self, slot, prefetch=True)
                name_of_thread = f"gpu-warm-{slot.name}"
                threading.Thread(target=self._prefetch, args=(lease,), name=name_of_thread, daemon=True).start()
        return warm

    # -- looking ------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What ``GET /gpu/status`` answers: device, host and models in bytes and seconds, None where unknown.

        Never counts as use and never waits for a move.
        """
        with self._lock:
            now_s = self._clock.now()
            models = {name: describe(slot, now_s, self.device.kind) for name, slot in self._slots.items()}
        return {
            "enabled": True,
            "device": {
                "name": self.device.name,
                "kind": self.device.kind,
                **vars(self.device.memory()),
                "note": self.device.note,
            },
            "host": vars(self._host.memory()),
            "models": models,
        }

    def wait_for(self, name: str, state: State, timeout: float | None = None) -> bool:
        """Wait until a model is in ``state``; False if ``timeout`` real seconds pass first."""
        slot = self._slots_named(name)[0]
        with slot.changed:
            return slot.changed.wait_for(lambda: slot.state is state, timeout)

    def close(self) -> None:
        """Refuse new requests, let the running ones end, release everything and stop the monitor. Idempotent.

        Requests that wait get `ManagerClosed`. RuntimeError if called by somebody who holds a lease, or in a loader.
        """
        self._refuse_own("close()", self.names())
        with self._lock:
            self._closed = True
            slots = list(self._slots.values())
            self._wake.notify_all()
        self._retire(slots, ManagerClosed())
        if self._monitor is not None and self._monitor is not threading.current_thread():
            self._monitor.join()

    # -- requests -----------------------------------------------------------------------------------------------

    def acquire(self, lease: Lease) -> Any:
        """For `Lease`: wait for its turn, bring the model to the device, return the engine."""
        slot = lease.slot
        with self._lock:
            self._check_open_locked(slot)
            if slot.mover == lease.thread:
                raise RuntimeError(
                    f"The loader of {slot.name!r} asks for {slot.name!r} itself, and would wait for ever."
                )
            if slot.holder is not None and slot.holder.thread == lease.thread and _in_event_loop():
                raise RuntimeError(
                    f"Another task of this event loop holds {slot.name!r}, and waiting would block it too: take leases "
                    f"in worker threads (asyncio.to_thread)."
                )
            slot.queue.append(lease)
        try:
            while True:
                with self._lock:
                    while lease.error is None and not (
                        slot.queue[0] is lease and slot.holder is None and slot.state.settled
                    ):
                        slot.changed.wait()
                    if lease.error is not None:
                        raise lease.error
                    if slot.state is State.DEVICE:
                        slot.queue.popleft()
                        slot.holder = lease
                        return slot.engine
                    move = self._begin_locked(slot, Move(slot.name, slot.state, State.DEVICE))
                self._carry_out(slot, move, lease)
                if slot.holder is lease:
                    return slot.engine
        except BaseException:
            with self._lock:
                if lease in slot.queue:
                    slot.queue.remove(lease)
                if not slot.in_use and slot.state.settled and self._due_locked(slot) is None:
                    slot.asked = None
                slot.changed.notify_all()
                self._wake.notify_all()
            raise

    def give_back(self, lease: Lease) -> None:
        """For `Lease`: end it, and carry out here what its end brings, so that the caller finds it done."""
        slot = lease.slot
        with self._lock:
            slot.holder = None
            slot.idle_since_s = self._clock.now()
            slot.not_before_s = slot.idle_since_s + WARM_GRACE_S if lease.prefetch else -math.inf
            move = self._due_locked(slot)
            if move:
                self._begin_locked(slot, move)
            slot.asked = None
            slot.changed.notify_all()
            self._wake.notify_all()
        if move:
            self._carry_out_quietly(slot, move)

    def _prefetch(self, lease: Lease) -> None:
        try:
            with lease:
                pass
        except Exception:
            logger.warning("%s: could not be warmed; the next request tries again", lease.slot.name)

    # -- moves --------------------------------------------------------------------------------------------------

    def _ask(self, name: str | None, target: State) -> bool:
        answers = [self._ask_one(slot, target) for slot in self._slots_named(name)]
        return all(answers)

    def _ask_one(self, slot: Slot, target: State) -> bool:
        with self._lock:
            self._check_open_locked(slot)
            while not slot.in_use and not slot.state.settled:
                slot.changed.wait()
            if slot.in_use:
                if target is State.HOST and not self.device.separate:
                    return True
                if slot.asked is not State.RELEASED:
                    slot.asked = target
                return False
            move = move_towards(slot, target, self.device.separate)
            if move is None:
                return True
            self._begin_locked(slot, move)
        self._carry_out(slot, move)
        return True

    def _begin_locked(self, slot: Slot, move: Move) -> Move:
        slot.state = move.via
        slot.mover = threading.get_ident()
        slot.changed.notify_all()
        return move

    def _carry_out(self, slot: Slot, move: Move, claim: Lease | None = None) -> None:
        """Do a move that was begun; on an error the model is back where it was and everyone who waited knows.

        ``claim`` gets the model together with its arrival, before anybody can ask for it to leave again.
        """
        started_s = self._clock.now()
        try:
            moved_bytes = self._mover.carry_out(slot, move)
        except BaseException as error:
            with self._lock:
                slot.state = _state_after_failure(slot, move)
                slot.mover = None
                slot.last_error = f"{type(error).__name__}: {error}"
                slot.not_before_s = self._clock.now() + RETRY_AFTER_S
                if move.target is State.DEVICE and isinstance(error, Exception):
                    for lease in slot.queue:
                        lease.error = error
                    slot.queue.clear()
                slot.changed.notify_all()
                self._wake.notify_all()
            logger.error("%s: %s failed, back to %s: %s", slot.name, move.via.value, slot.state.value, error)
            raise
        with self._lock:
            elapsed_s = self._clock.now() - started_s
            slot.state = move.target
            slot.mover = None
            if move.target is State.DEVICE:
                slot.idle_since_s = self._clock.now()
            if claim is not None and claim.error is None:
                slot.queue.remove(claim)
                slot.holder = claim
            slot.last_move = MoveRecord(move, moved_bytes, elapsed_s)
            slot.last_error = None
            slot.changed.notify_all()
            self._wake.notify_all()
        source, target = (state.shown(self.device.kind) for state in (move.source, move.target))
        logger.info(
            "%s: %s -> %s, %.1f MB in %.3f s (%s)",
            slot.name, source, target, moved_bytes / 1e6, elapsed_s, self.device.name,
        )  # fmt: skip

    def _carry_out_quietly(self, slot: Slot, move: Move) -> None:
        # Nobody asked for this move, so there is nobody to raise to; `status` and the log have the error.
        try:
            self._carry_out(slot, move)
        except Exception:
            logger.debug("%s: %s", slot.name, move, exc_info=True)

    def _retire(self, slots: list[Slot], reason: ResidencyError) -> None:
        """Refuse what waits for these models with ``reason``, let what runs end, and release them."""
        with self._lock:
            for slot in slots:
                slot.closing = True
                for lease in slot.queue:
                    # A request that is loading right now finds out when it has loaded.
                    lease.error = reason
                slot.changed.notify_all()
        for slot in slots:
            with self._lock:
                while slot.in_use or not slot.state.settled:
                    slot.changed.wait()
                move = move_towards(slot, State.RELEASED, self.device.separate)
                if move:
                    self._begin_locked(slot, move)
            if move:
                self._carry_out_quietly(slot, move)
            self._mover.forget(slot)  # what a release has kept for the next load
            slot.kept = slot.keep = None

    # -- the monitor --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Sleep until the next deadline, carry out what is due; no polling."""
        while True:
            with self._lock:
                due = self._next_due_locked()
                while due is None and not self._closed:
                    deadline_s = min(
                        (next_deadline(slot, self.device.separate) for slot in self._slots.values()), default=math.inf
                    )
                    self._clock.wait(self._wake, deadline_s - self._clock.now())
                    due = self._next_due_locked()
                if self._closed or due is None:
                    return
                slot, move = due
                self._begin_locked(slot, move)
            self._carry_out_quietly(slot, move)

    def _next_due_locked(self) -> tuple[Slot, Move] | None:
        for slot in self._slots.values():
            move = self._due_locked(slot)
            if move:
                slot.asked = None
                return slot, move
        return None

    def _due_locked(self, slot: Slot) -> Move | None:
        return None if slot.closing else due_move(slot, self._clock.now(), self.device.separate)

    # -- helpers ------------------------------------------------------------------------------------------------

    def _slots_named(self, name: str | None) -> list[Slot]:
        with self._lock:
            if name is None:
                return list(self._slots.values())
            if name not in self._slots:
                raise UnknownModel(name, tuple(self._slots))
            return [self._slots[name]]

    def _refuse_own(self, what: str, names: tuple[str, ...]) -> None:
        """RuntimeError where waiting for these models' requests would be waiting for oneself."""
        with self._lock:
            moved_here = any(slot.mover == threading.get_ident() for slot in self._slots.values() if slot.name in names)
        if moved_here or any(lease.lessor is self and lease.slot.name in names for lease in held_leases()):
            raise RuntimeError(f"{what} would wait for the lease or the load that called it; leave it first.")

    def _check_open_locked(self, slot: Slot) -> None:
        if self._closed:
            raise ManagerClosed
        if slot.closing:
            raise UnknownModel(slot.name, tuple(self._slots))


def _state_after_failure(slot: Slot, move: Move) -> State:
    """Where a model is whose move has failed: where it was, unless its bytes had gone already."""
    if slot.engine is None:
        return State.RELEASED
    off_the_device = slot.resident is not None and not slot.resident.device_bytes
    return State.HOST if move.via is State.OFFLOADING and off_the_device else move.source


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


_singleton: GPUResourceManager | None = None
_singleton_lock = threading.Lock()


def get_gpu_manager(
    device: Device | None = None,
    *,
    keep_warm: float | str | None = None,
    idle_timeout: float | str | None = None,
    snapshot_dir: str | Path | None = None,
    snapshot_limit_bytes: int | None = None,
) -> GPUResourceManager:
    """The manager of this process, made on the first call. Settings left out are those it already has.

    `SettingsConflict` if it exists with other settings than those given; after `close` a new one is made.
    """
    global _singleton
    with _singleton_lock:
        if _singleton is None or _singleton.closed:
            _singleton = GPUResourceManager(
                device,
                keep_warm=0 if keep_warm is None else keep_warm,
                idle_timeout=600 if idle_timeout is None else idle_timeout,
                snapshot_dir=snapshot_dir,
                snapshot_limit_bytes=snapshot_limit_bytes,
            )
            return _singleton
        present = _singleton
        asked_and_present = {
            "device": (device, present.device),
            "keep_warm": (None if keep_warm is None else seconds(keep_warm), present.policy.keep_warm_s),
            "idle_timeout": (None if idle_timeout is None else seconds(idle_timeout), present.policy.idle_timeout_s),
            "snapshot_dir": (None if snapshot_dir is None else Path(snapshot_dir), present.snapshot_dir),
            "snapshot_limit_bytes": (snapshot_limit_bytes, present.snapshot_limit_bytes),
        }
        for setting, (asked, have) in asked_and_present.items():
            if asked is not None and asked != have:
                raise SettingsConflict(setting, str(have), str(asked))
        return present


if __name__ == "__main__":
    from residency.cli import main

    raise SystemExit(main())
