"""The GPU manager: moves idle models off the GPU, and back for the next request.

    manager = get_gpu_manager(idle_timeout=600)
    manager.register("tts", load=build_engine)
    with manager.lease("tts") as engine:      # loaded or restored, and on the device until the block ends
        audio = engine.clone(...)

Each move is planned under one lock, carried out in its own thread without the lock, and committed or rolled back under
the lock. A timeout or cancellation of a request does not stop a move.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from residency.clock import SystemClock
from residency.contracts import Clock, Device, Policy, Time
from residency.devices import CpuDevice, CudaDevice, SimulatedDevice, find_device
from residency.devices.host_probes import host_memory, remeasured, sample, worker_memory

from residency.errors import (  # isort: skip
    DeviceLost, DeviceOutOfMemory, DeviceUnavailable, EventLoopBlocked, InvalidInput, LeaseDeadlock, LoadTimeout,
    ManagerClosed, ModelBusy, ModelExists, RequestCancelled, RequestTimeout, ResidencyError, SettingsConflict,
    UnknownModel,
)  # fmt: skip
from residency.locks import renewed_in_children
from residency.memory import BorrowedPart, SnapshotFolder, adopt, kept_weights
from residency.observability.events import Event
from residency.random_state import RandomState
from residency.scheduling.admission import Admission
from residency.scheduling.dispatcher import Dispatcher
from residency.scheduling.lease import Lease, watching
from residency.scheduling.leaving import Leaving
from residency.scheduling.managed_model import ManagedModel
from residency.scheduling.manual_control import ManualControl
from residency.scheduling.move_runner import MoveRunner
from residency.scheduling.mover import Adopt, Mover
from residency.scheduling.planner import will_not_reach
from residency.scheduling.policies import change_policy, check_counts, comparable, policy_for, seconds
from residency.scheduling.registry import Registry
from residency.scheduling.status import Overview
from residency.scheduling.worker_status import Workers
from residency.sharing import Sharing
from residency.sharing.card import ask_neighbor, share_card, sharing_of
from residency.states import State
from residency.status_types import Status, UsageHistory
from residency.workers.isolation import IsolationMode, Residue, isolation_for

__all__ = ["CpuDevice", "CudaDevice", "DeviceLost", "DeviceOutOfMemory", "DeviceUnavailable", "Event",
           "EventLoopBlocked", "GPUResourceManager", "Lease", "LeaseDeadlock", "LoadTimeout", "ManagerClosed",
           "ModelBusy", "ModelExists", "RequestCancelled", "RequestTimeout", "ResidencyError", "SettingsConflict",
           "Sharing", "SimulatedDevice", "State", "UnknownModel", "find_device", "get_gpu_manager",
           "kept_weights"]  # fmt: skip


class GPUResourceManager(AbstractContextManager["GPUResourceManager"]):
    """Moves named models between device, host memory and released; never moves a model in use.

    Args:
        device: None selects the first visible GPU, or else the CPU. keep_warm, idle_timeout: defaults for `register`.
        snapshot_dir: folder for the weights of released models, for reloads; at most ``snapshot_limit_bytes``.
        budget_bytes: limit of device memory for all models together.
        wait_timeout: default limit of the wait for a turn and for room, without the move; -1: no limit.
        isolation: ``"process"``: each engine in a worker process that a release ends; leases return a `RemoteEngine`.
        sharing: how the card is shared with other processes; None: it is not.
        residue: what becomes of a worker's other device memory at an offload: ``"keep"``, ``"checkpoint"``, ``"auto"``.

    Thread-safe; `status` returns at once, even during a load. In a forked child the manager is closed.
    """

    #: Excludes the manager from discovery: an engine may refer to it, but its other models are not part of the engine.
    not_of_the_engine = True

    def __init__(
        self,
        device: Device | None = None,
        *,
        keep_warm: float | str = 0,
        idle_timeout: float | str = 600,
        snapshot_dir: str | Path | None = None,
        snapshot_limit_bytes: int | None = None,
        budget_bytes: int | None = None,
        wait_timeout: float | str = -1,
        isolation: IsolationMode = "none",
        residue: Residue = "auto",
        sharing: Sharing | None = None,
        clock: Clock | None = None,
        adopt: Adopt = adopt,
    ) -> None:
        check_counts(1, budget_bytes=budget_bytes)
        device = device or find_device()
        self.settings = comparable(
            device=device, keep_warm=keep_warm, idle_timeout=idle_timeout, snapshot_dir=snapshot_dir,
            snapshot_limit_bytes=snapshot_limit_bytes, budget_bytes=budget_bytes, wait_timeout=wait_timeout,
            isolation=isolation, residue=residue, sharing=sharing,
        )  # fmt: skip
        self._isolation = isolated = isolation_for(isolation, device, snapshot_dir, residue)
        self.device: Device = isolated.observed if isolated else device
        dispatcher = self._dispatcher = Dispatcher(self.device, clock or SystemClock(), budget_bytes or math.inf)
        adopt = partial(isolated.adopt, ended=dispatcher.engine_ended) if isolated else adopt
        mover = Mover(self.device, adopt, SnapshotFolder(snapshot_dir, snapshot_limit_bytes) if snapshot_dir else None)
        self._share = share_card(sharing, self.device, Leaving(dispatcher), dispatcher.notifier.listeners.subscribe)
        self._moves = MoveRunner(dispatcher, mover, partial(sample, self.device), self._share)
        self._registry = Registry(dispatcher)
        self._admission = Admission(dispatcher, self._registry.check_open_locked, seconds(wait_timeout))
        self._manual_control = ManualControl(dispatcher, self._moves, mover, self._registry.check_open_locked)
        workers = Workers(dispatcher, partial(worker_memory, self.device), isolated.loading.get) if isolated else None
        remeasure, sharing_status = partial(remeasured, self.device), partial(sharing_of, self._share)
        self._overview = Overview(dispatcher, budget_bytes, host_memory, remeasure, workers, sharing_status)

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._registry.closed

    @property
    def _managed_models(self) -> dict[str, ManagedModel]:
        return self._dispatcher.managed_models

    def register(
        self,
        name: str,
        load: Callable[[], Any],
        *,
        keep_warm: float | str | None = None,
        idle_timeout: float | str | None = None,
        policy: Policy | None = None,
        load_timeout: float | str = -1,
        max_waiting: int | None = None,
        size_bytes: int = 0,
        skip: Collection[str] = (),
        keep: Any = None,
    ) -> None:
        """Registers a model. The first request calls ``load``, which builds the engine and places it on the device.

        ``load`` runs in its own thread, in the context of the request that causes it, and with the random state of this
        call, so that every load builds the same engine.

        Args:
            keep_warm: seconds on the device after a request, or ``"15m"``; -1: always, even if other models need room;
                ``"auto"``: learned from the times of requests.
            idle_timeout: idle seconds until release, or ``"15m"``; -1: never.
            policy: replaces these two: a `residency.contracts.Policy`, one object for each model. An error in it is
                logged, and 0 and 600 seconds replace it.
            load_timeout: seconds after which a load fails with `LoadTimeout`; the next request starts a new load.
            max_waiting: maximum of waiting requests; further ones get `ModelBusy`. None: no limit.
            size_bytes: size on the device, for the budget of the first load; later loads use the measured size.
            skip: attribute paths of the engine (``.tokenizer``); objects below them are not moved.
            keep: a part of the engine that ``load`` uses and that outlives a release; not with process isolation. It is
                offloaded now, and restored to the device by `unregister` or `close`. Only the engine may use it.

        Raises `ModelExists` if the name is taken.
        """
        check_counts(0, max_waiting=max_waiting, size_bytes=size_bytes)
        if isinstance(skip, str):
            raise InvalidInput(f"skip is several paths: give [{skip!r}]", f"skip 是多个路径：请写 [{skip!r}]")
        self._registry.check_free(name)
        limit_s = seconds(load_timeout)
        if self._isolation:
            load = self._isolation.loader(name, load, tuple(skip), limit_s, keep)
        managed = ManagedModel(name, load, policy_for(policy, keep_warm, idle_timeout, self.settings))
        managed.load_timeout_s, managed.skip, managed.random_state = limit_s, tuple(skip), RandomState()
        managed.leases.max_waiting = math.inf if max_waiting is None else max_waiting
        managed.memory.size_bytes = size_bytes
        managed.borrowed_part = None if keep is None else BorrowedPart(keep, self.device)
        self._registry.add(managed)

    def configure(self, name: str | None = None, *, keep_warm: Time = None, idle_timeout: Time = None) -> None:
        """Changes how long a model (None: all) stays; also applies to the current idle time.

        ``keep_warm`` replaces a policy given to `register`, and that of the last request; ``idle_timeout`` alone is
        passed on to that policy.
        """
        for managed in self._registry.named(name):
            with self._dispatcher.replanning(managed), self._dispatcher.lock:
                self._registry.check_open_locked(managed)
                managed.policy = change_policy(managed.policy, keep_warm, idle_timeout)
                managed.asked_warm_s = managed.asked_warm_s if keep_warm is None else None

    def unregister(self, name: str) -> None:
        """Releases a model after its running requests and removes it; waiting requests get `UnknownModel`.

        Raises RuntimeError if called from within a lease of the model.
        """
        managed = self._registry.named(name)[0]
        self._admission.deadlocks.refuse_own("unregister()", [managed])
        error = UnknownModel(name, tuple(other for other in self.names() if other != name))
        self._manual_control.retire([managed], error, math.inf)
        self._registry.remove(managed)

    def names(self) -> tuple[str, ...]:
        """Returns the names of the models, in order of registration."""
        return tuple(managed.name for managed in self._registry.named(None))

    def lease(self, name: str, timeout: Time = None, *, reading: bool = False, keep_warm: Time = None) -> Lease:
        """Returns a context manager for one use of a model: its value is the engine, on the device until the end.

        ``with`` blocks its thread, including an event loop that runs in it; coroutines use ``async with``.

        A nested lease of the same model in the same thread of control, or in a task or thread started with its context,
        shares the first lease, because waiting for it would be a deadlock. So code that starts a task for each of
        several requests takes no lease for them: each task takes its own, and starts outside of other leases or with
        ``contextvars.Context().run``.

        Args:
            timeout: seconds (or ``"30s"``) until the model must be available. 0: do not wait; -1: no limit; None: the
                manager's ``wait_timeout``, which excludes the load.
            reading: shares the model with the current request, if any. Only for reading values.
            keep_warm: how long the model stays on the device after this request, instead of what its policy says, until
                the next request: seconds, or ``"5m"`` as in Ollama's ``keep_alive``; -1: no limit. It leaves earlier
                for other models that need room, also with -1, and by `offload`, `release` and `configure`. Of leases
                that share a request, the longest counts; None, and a shared reading lease, have no effect.

        Raises, on entering: the loader's error (for all requests that waited for the load; the next request tries
        again), `DeviceOutOfMemory`, `ManagerClosed`, `RequestTimeout`, `ModelBusy` (a timeout of 0, or too many
        waiting), `RequestCancelled`, `LoadTimeout`, `LeaseDeadlock`, or `EventLoopBlocked`.
        """
        return Lease(self._admission, self._registry.named(name)[0], timeout, reading, keep_warm)

    def offload(self, name: str | None = None) -> bool:
        """Moves a model (None: all) to host memory. False: pending until its request or its arrival ends."""
        return self._registry.for_each(name, lambda managed: self._manual_control.bring_down(managed, State.HOST))

    def release(self, name: str | None = None) -> bool:
        """Frees a model's device and host memory (None: all models). Returns the same as `offload`."""
        return self._registry.for_each(name, lambda managed: self._manual_control.bring_down(managed, State.RELEASED))

    def warm(self, name: str | None = None, *, if_idle: bool = False) -> bool:
        """Starts moving a model (None: all) to the device and returns at once. True: it is already there.

        Without a request within `WARM_GRACE_S` the model leaves again; for a model in use, this time starts when its
        requests end. Cancels a pending `offload` or `release`. ``if_idle``: does nothing to a model in use. A failure
        is logged and shown in `status`; the next request tries again.
        """
        return self._registry.for_each(name, lambda managed: self._manual_control.warm(managed, if_idle))

    def make_room(self, name: str) -> None:
        """Offloads the other idle models and empties the device's caches, for the model ``name``."""
        self._manual_control.move_aside(managed for managed in self._registry.named(None) if managed.name != name)

    def status(self) -> Status:
        """Returns the answer of ``GET /gpu/status``. Does not count as use, and does not wait for moves."""
        return self._overview.status()

    def ask_neighbor(self, url: str) -> None:
        """Asks one of the status's ``neighbors`` to give up what it holds idle. Raises if it is unknown or in use."""
        ask_neighbor(self._share, url)

    @property
    def device_lost(self) -> DeviceLost | None:
        """The error if this process can no longer use the device; else None."""
        return self._dispatcher.device_lost

    @property
    def version(self) -> int:
        """A number that changes whenever `status` does, except for times and free memory."""
        return self._dispatcher.version

    def history(self) -> UsageHistory:
        """Returns the answer of ``GET /gpu/history``: counts since the start, the last moves, the last 15 minutes."""
        return self._overview.history()

    @staticmethod
    def watching(watch: Callable[[Lease], object]) -> AbstractContextManager[None]:
        """Calls ``watch`` with each lease entered in this context, before it waits; its error ends the request."""
        return watching(watch)

    def subscribe(self, listener: Callable[[Event], Any]) -> Callable[[], None]:
        """Calls ``listener`` for moves (begin, progress, end) and queue changes; the result unsubscribes it.

        The calls come in order, in a separate thread. Errors of the listener are logged.
        """
        return self._dispatcher.notifier.listeners.subscribe(listener)

    def wait_for(self, name: str, state: State, timeout: float | str | None = None) -> bool:
        """Waits until a model is in ``state``; returns False after ``timeout`` (real seconds or ``"5s"``).

        Also returns False if the last load or restore of the model failed, or if the model is removed.
        """
        managed = self._registry.named(name)[0]
        timeout_s = math.inf if timeout is None else seconds(timeout)
        self._dispatcher.watch(
            managed, lambda: managed.state is state or will_not_reach(managed, state), timeout_s, SystemClock()
        )
        return managed.state is state

    def close(self, grace: float | str | None = None) -> bool:
        """Refuses new requests, waits for running ones, releases all models and stops the monitor. Idempotent.

        Waiting requests get `ManagerClosed`. Returns False if a request or load, which keeps its model, still runs
        after ``grace`` seconds (None or -1: no limit). Raises RuntimeError if called from within a lease or a loader.
        """
        end_s = SystemClock().now() + (grace_s := math.inf if grace is None else seconds(grace))
        self._admission.deadlocks.refuse_own("close()", self._registry.named(None))
        self._registry.closed = True
        all_released = self._manual_control.retire(self._registry.named(None), ManagerClosed(), grace_s)
        self._dispatcher.monitor.stop()
        if self._share:
            self._share.close(end_s - SystemClock().now())
        self._dispatcher.notifier.listeners.close()
        if self._isolation and all_released:
            self._isolation.close()
        return all_released


_singleton: GPUResourceManager | None = None
_singleton_lock = renewed_in_children(threading.Lock())


def get_gpu_manager(
    device: Device | None = None,
    *,
    keep_warm: float | str | None = None,
    idle_timeout: float | str | None = None,
    snapshot_dir: str | Path | None = None,
    snapshot_limit_bytes: int | None = None,
    budget_bytes: int | None = None,
    wait_timeout: float | str | None = None,
    isolation: IsolationMode | None = None,
    residue: Residue | None = None,
    sharing: Sharing | None = None,
) -> GPUResourceManager:
    """Returns the manager of this process; creates it on the first call and after `close`.

    Raises `SettingsConflict` if it exists with other values of the given settings.
    """
    global _singleton
    asked: dict[str, Any] = {name: value for name, value in locals().items() if value is not None}
    with _singleton_lock:
        if _singleton is None or _singleton.closed:
            _singleton = GPUResourceManager(**asked)
        for setting, value in comparable(**asked).items():
            if value != (present := _singleton.settings[setting]):
                raise SettingsConflict(setting, str(present), str(value))
        return _singleton


if __name__ == "__main__":
    from residency.launch.command_line import main

    raise SystemExit(main())
