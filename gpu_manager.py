"""The manager: models leave the GPU when they are idle and return for the next request.

    manager = get_gpu_manager(idle_timeout=600)
    manager.register("tts", load=build_engine)
    with manager.lease("tts") as engine:      # loaded or restored, and on the device until the block ends
        audio = engine.clone(...)

Every change is planned under one lock, carried out in a thread of its own outside of it, committed or rolled back
under the lock, and then reported. A move belongs to no request: a timeout or a cancellation does not stop it.
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
from residency.contracts import Adopt, Clock, Device, Policy
from residency.devices import CpuDevice, CudaDevice, SimulatedDevice, find_device
from residency.devices.probes import HostProbe, remeasured, sample
from residency.errors import (
    DeviceLost,
    DeviceOutOfMemory,
    DeviceUnavailable,
    EventLoopBlocked,
    InvalidInput,
    LeaseDeadlock,
    LoadTimeout,
    ManagerClosed,
    ModelBusy,
    ModelExists,
    RequestCancelled,
    RequestTimeout,
    ResidencyError,
    SettingsConflict,
    UnknownModel,
)
from residency.locks import renewed_in_children
from residency.memory import BorrowedPart, BorrowedResident, SnapshotFolder, adopt
from residency.observability.events import Event
from residency.scheduling.admission import Admission
from residency.scheduling.dispatcher import Dispatcher
from residency.scheduling.lease import Lease, watching
from residency.scheduling.managed_model import ManagedModel
from residency.scheduling.manual_control import ManualControl
from residency.scheduling.move_runner import MoveRunner
from residency.scheduling.mover import Mover
from residency.scheduling.overview import Overview
from residency.scheduling.planner import will_not_reach
from residency.scheduling.policies import change_policy, check_counts, comparable, policy_for, seconds
from residency.scheduling.process_lifetime import end_with_the_process
from residency.scheduling.random_state import RandomState
from residency.scheduling.registry import Registry
from residency.states import State
from residency.status_types import Status, UsageHistory

__all__ = ["CpuDevice", "CudaDevice", "DeviceLost", "DeviceOutOfMemory", "DeviceUnavailable", "Event",
           "EventLoopBlocked", "GPUResourceManager", "Lease", "LeaseDeadlock", "LoadTimeout", "ManagerClosed",
           "ModelBusy", "ModelExists", "RequestCancelled", "RequestTimeout", "ResidencyError", "SettingsConflict",
           "SimulatedDevice", "State", "UnknownModel", "find_device", "get_gpu_manager"]  # fmt: skip


class GPUResourceManager(AbstractContextManager["GPUResourceManager"]):
    """Moves named models between device, host memory and released, and never under a running request.

    Args:
        device: None takes the best device found.
        keep_warm, idle_timeout: defaults for `register`.
        snapshot_dir: a folder for released weights, of at most ``snapshot_limit_bytes``, from which they are reloaded.
        budget_bytes: the models together take at most so much of the device.
        wait_timeout: how long a request without a timeout of its own waits for its turn and for room. -1: for ever.
            Loads and restores on its behalf are not counted.

    All methods may be called from any thread. Moves run outside the lock, so `status` answers at once even while a
    model loads. A forked child has a closed manager: the models stay the parent's.
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
        budget_bytes: int | None = None,
        wait_timeout: float | str = -1,
        clock: Clock | None = None,
        adopt: Adopt = adopt,
    ) -> None:
        check_counts(1, budget_bytes=budget_bytes)
        self.device: Device = device or find_device()
        self.settings = comparable(
            device=self.device,
            keep_warm=keep_warm,
            idle_timeout=idle_timeout,
            snapshot_dir=snapshot_dir,
            snapshot_limit_bytes=snapshot_limit_bytes,
            budget_bytes=budget_bytes,
            wait_timeout=wait_timeout,
        )
        snapshots = None if snapshot_dir is None else SnapshotFolder(snapshot_dir, snapshot_limit_bytes)
        mover = Mover(self.device, adopt, snapshots)
        clock = clock or SystemClock()
        dispatcher = Dispatcher(self.device, clock, math.inf if budget_bytes is None else budget_bytes)
        self._dispatcher = dispatcher
        self._moves = MoveRunner(dispatcher, mover, partial(sample, self.device))
        self._registry = Registry(dispatcher, mover)
        check_locked = self._registry.check_open_locked
        self._admission = Admission(dispatcher, check_locked, self.settings["wait_timeout"])
        self._manual_control = ManualControl(dispatcher, self._moves, mover, check_locked)
        remeasure = partial(remeasured, device=self.device)
        self._overview = Overview(dispatcher, budget_bytes, HostProbe().memory, remeasure)
        end_with_the_process(self._registry)

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
        """Put a model under management; ``load`` builds its engine on the first request, and not before.

        ``load`` places the weights on the device itself. It runs in a thread of its own, with the context of the
        request that it serves and with the random numbers of now: it makes the same engine whenever it runs.

        Args:
            keep_warm: seconds on the device after a request, or ``"15m"``; -1: always, also if others need room;
                ``"auto"``: learned from the arrivals.
            idle_timeout: seconds idle until it is released, or ``"15m"``; -1: never.
            policy: replaces these two: a `residency.contracts.Policy`, one object for each model. If it raises, that is
                logged, and 0 and 600 seconds replace it.
            load_timeout: seconds after which a load is given up (`LoadTimeout`) and the next request loads anew.
            max_waiting: how many requests may wait; further ones get `ModelBusy`. None: any number.
            size_bytes: its size on the device, for the budget of the first load; later it is measured.
            skip: attribute paths of the engine (``.tokenizer``); objects below them are left alone.
            keep: a part of the engine that ``load`` is given and that must outlive a release. It leaves the device now,
                and comes back to it when the model is unregistered or the manager closed. Only the engine may use it.

        Raises:
            ModelExists: the name is taken.
        """
        chosen = policy_for(policy, keep_warm, idle_timeout, self.settings)
        load_timeout_s = seconds(load_timeout)
        check_counts(0, max_waiting=max_waiting, size_bytes=size_bytes)
        if isinstance(skip, str):
            raise InvalidInput(f"skip is several paths: give [{skip!r}]", f"skip 是多个路径：请写 [{skip!r}]")
        self._registry.check_free(name)
        managed = ManagedModel(
            name, load, chosen, skip=tuple(skip), random_state=RandomState(), load_timeout_s=load_timeout_s
        )
        managed.leases.max_waiting = math.inf if max_waiting is None else max_waiting
        managed.memory.size_bytes = size_bytes
        if keep is not None:
            managed.borrowed_part = BorrowedPart(BorrowedResident(keep, self.device))
        self._registry.add(managed)

    def configure(
        self, name: str | None = None, *, keep_warm: float | str | None = None, idle_timeout: float | str | None = None
    ) -> None:
        """Change how long a model (None: all) stays, from now on and for the idle time that has begun too.

        ``keep_warm`` takes the place of a policy given to `register`; ``idle_timeout`` alone is passed on to it.
        """
        for managed in self._registry.named(name):
            with self._dispatcher.replanning(managed), self._dispatcher.lock:
                self._registry.check_open_locked(managed)
                managed.policy = change_policy(managed.policy, keep_warm, idle_timeout)

    def unregister(self, name: str) -> None:
        """Release a model once its requests have ended and forget it; requests that wait get `UnknownModel`.

        RuntimeError if the calling code holds a lease on it.
        """
        managed = self._registry.named(name)[0]
        self._admission.deadlocks.refuse_own("unregister()", [managed])
        error = UnknownModel(name, tuple(other for other in self.names() if other != name))
        self._manual_control.retire([managed], error, math.inf)
        self._registry.remove(managed)

    def names(self) -> tuple[str, ...]:
        """The registered models, in order of registration."""
        return tuple(managed.name for managed in self._registry.named(None))

    def lease(self, name: str, timeout: float | str | None = None, *, reading: bool = False) -> Lease:
        """A context manager that gives the model's engine, on the device, and takes it back at its end.

        A plain ``with`` blocks its thread, and the event loop that runs in it; coroutines write ``async with``.

        A lease of the same model in the same thread of control, and in tasks and threads that were started with its
        context, shares the first one, because waiting for it would never end. So code that starts a task for each of
        several requests takes no lease for them: each task takes its own, and starts outside of other leases or with
        ``contextvars.Context().run``.

        At the end of a plain ``with`` a model of at most 64 MB has left the device, unless that takes longer than a
        quarter of a second; larger ones leave afterwards: `status` says ``moving``, and `offload` waits for it.

        Args:
            timeout: seconds (or ``"30s"``) to wait until the model is there. 0: do not wait; -1: for ever; None: the
                manager's ``wait_timeout``, which does not count the load.
            reading: if a request has the model, run beside it. Only for reading values.

        Raises, on entering: the loader's error (all requests that waited for the load get it; the next one tries
        again), `DeviceOutOfMemory`, `ManagerClosed`, `RequestTimeout`, `ModelBusy` (a timeout of 0, or too many
        waiting), `RequestCancelled`, `LoadTimeout`, `LeaseDeadlock`, or `EventLoopBlocked`.
        """
        managed = self._registry.named(name)[0]
        return Lease(self._admission, managed, None if timeout is None else seconds(timeout), reading)

    def offload(self, name: str | None = None) -> bool:
        """Bring a model (None: all) to host memory. True: done; False: follows the running request, or its arrival."""
        return self._registry.for_each(name, lambda managed: self._manual_control.bring_down(managed, State.HOST))

    def release(self, name: str | None = None) -> bool:
        """Give up a model's memory (None: all) everywhere. Answers as `offload` does."""
        return self._registry.for_each(name, lambda managed: self._manual_control.bring_down(managed, State.RELEASED))

    def warm(self, name: str | None = None, *, if_idle: bool = False) -> bool:
        """Begin to bring a model (None: all) to the device and return at once. True: it is there already.

        Without a request within `WARM_GRACE_S` it leaves again; of a model in use, those seconds begin when its
        requests have ended. A pending `offload` or `release` is cancelled. With ``if_idle`` a model in use is left
        alone. A failure is logged and shown in `status`; the next request tries again.
        """
        return self._registry.for_each(name, lambda managed: self._manual_control.warm(managed, if_idle))

    def make_room(self, name: str) -> None:
        """Offload the other models as far as they are idle, and empty the device's caches, for the model ``name``."""
        self._manual_control.move_aside(managed for managed in self._registry.named(None) if managed.name != name)

    def status(self) -> Status:
        """Returns the answer of ``GET /gpu/status``: device, host and models in bytes and seconds, None where unknown.

        Never counts as use and never waits for a move."""
        return self._overview.status()

    @property
    def device_lost(self) -> DeviceLost | None:
        """The error after which the device answers no call of this process any more; None if it does."""
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
        """A block, and what starts with its context, in which ``watch`` sees each lease before it waits.

        If ``watch`` raises, the request ends with that error.
        """
        return watching(watch)

    def subscribe(self, listener: Callable[[Event], Any]) -> Callable[[], None]:
        """Call ``listener`` for moves (begin, progress, end) and changes of queues, until the answer is called.

        The calls come in order, in a thread of their own. Errors of the listener are logged.
        """
        return self._dispatcher.notifier.listeners.subscribe(listener)

    def wait_for(self, name: str, state: State, timeout: float | str | None = None) -> bool:
        """Wait until a model is in ``state``; False if it will not be.

        That is if ``timeout`` (real seconds or ``"5s"``) passes, its last load or restore has failed, or it is removed.
        """
        managed = self._registry.named(name)[0]
        timeout_s = math.inf if timeout is None else seconds(timeout)
        self._dispatcher.watch(
            managed, lambda: managed.state is state or will_not_reach(managed, state), timeout_s, SystemClock()
        )
        return managed.state is state

    def close(self, grace: float | str | None = None) -> bool:
        """Refuse new requests, let the running ones end, release everything and stop the monitor. Idempotent.

        Requests that wait get `ManagerClosed`. False if a request or a load still runs after ``grace`` seconds (None
        or -1: as long as it takes): it keeps its model. RuntimeError if the calling code holds a lease or is a loader.
        """
        grace_s = math.inf if grace is None else seconds(grace)
        self._admission.deadlocks.refuse_own("close()", self._registry.named(None))
        self._registry.closed = True
        all_released = self._manual_control.retire(self._registry.named(None), ManagerClosed(), grace_s)
        self._dispatcher.monitor.stop()
        self._dispatcher.notifier.listeners.close()
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
) -> GPUResourceManager:
    """The manager of this process, made on the first call. Settings left out are those it already has.

    `SettingsConflict` if it exists with other settings than those given; after `close` a new one is made.
    """
    global _singleton
    asked: dict[str, Any] = {name: value for name, value in locals().items() if value is not None}
    with _singleton_lock:
        if _singleton is None or _singleton.closed:
            _singleton = GPUResourceManager(**asked)
        for setting, value in comparable(**asked).items():
            present = _singleton.settings[setting]
            if value != present:
                raise SettingsConflict(setting, str(present), str(value))
        return _singleton


if __name__ == "__main__":
    from residency.launch.command_line import main

    raise SystemExit(main())
