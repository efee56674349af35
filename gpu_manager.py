"""The manager: models leave the GPU as soon as nobody uses them and return when somebody does.

    manager = get_gpu_manager(idle_timeout=600)
    manager.register("tts", load=build_engine)
    with manager.lease("tts") as engine:      # loaded or restored, and on the device until the block ends
        audio = engine.clone(...)

Every change goes one way: plan under the lock, move outside it in a thread of its own, commit or roll back under the
lock, notify. `residency.states` has the states, `residency.scheduling.planner` decides, this module acts. A move
belongs to no request: one that times out, is cancelled or interrupted leaves it to arrive.
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
from residency.observability.history import WINDOW_S
from residency.observability.outside_memory import totals
from residency.scheduling.admission import Admission
from residency.scheduling.callers import call_site
from residency.scheduling.dispatcher import Dispatcher
from residency.scheduling.lease import Lease, held_models, watching
from residency.scheduling.managed_model import ManagedModel
from residency.scheduling.manual_control import ManualControl
from residency.scheduling.mover import Mover
from residency.scheduling.policies import (
    change_policy,
    check_counts,
    guarded,
    keep_warm_seconds,
    make_policy,
    seconds,
)
from residency.scheduling.process_lifetime import end_with_the_process
from residency.scheduling.random_state import RandomState
from residency.scheduling.status import describe, describe_device
from residency.states import State
from residency.status_types import Status, UsageHistory

__all__ = [
    "CpuDevice",
    "CudaDevice",
    "DeviceLost",
    "DeviceOutOfMemory",
    "DeviceUnavailable",
    "Event",
    "EventLoopBlocked",
    "GPUResourceManager",
    "Lease",
    "LeaseDeadlock",
    "LoadTimeout",
    "ManagerClosed",
    "ModelBusy",
    "ModelExists",
    "RequestCancelled",
    "RequestTimeout",
    "ResidencyError",
    "SettingsConflict",
    "SimulatedDevice",
    "State",
    "UnknownModel",
    "find_device",
    "get_gpu_manager",
]


class GPUResourceManager:
    """Moves named models between device, host memory and released, and never under a running request.

    ``device=None`` takes the best device found. ``keep_warm`` and ``idle_timeout`` are defaults for `register`:
    seconds or ``"15m"``; -1 is never; ``keep_warm="auto"`` learns it. With ``snapshot_dir`` released weights are kept
    on disk there, at most ``snapshot_limit_bytes`` of them, and read back instead of loaded. With ``budget_bytes`` the
    models together take no more of the device: idle ones leave for others, and requests wait for models in use.
    ``wait_timeout`` is how long a request that names no time of its own waits for its turn and for room, at most; -1 is
    any time. A load or restore on its behalf is not counted.

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
        self.settings = _comparable(
            device=self.device,
            keep_warm=keep_warm,
            idle_timeout=idle_timeout,
            snapshot_dir=snapshot_dir,
            snapshot_limit_bytes=snapshot_limit_bytes,
            budget_bytes=budget_bytes,
            wait_timeout=wait_timeout,
        )
        snapshots = None if snapshot_dir is None else SnapshotFolder(snapshot_dir, snapshot_limit_bytes)
        self._mover = Mover(self.device, adopt, snapshots)
        self._clock: Clock = clock or SystemClock()
        self._host = HostProbe()
        self._dispatcher = Dispatcher(
            self.device,
            self._mover,
            self._clock,
            math.inf if budget_bytes is None else budget_bytes,
            partial(sample, self.device),
        )
        self._admission = Admission(self._dispatcher, self._check_open_locked, self.settings["wait_timeout"])
        self._manual_control = ManualControl(self._dispatcher, self._check_open_locked)
        self._closed = False
        self._parents_models: dict[str, ManagedModel] = {}
        self._remeasured_s = -math.inf
        end_with_the_process(self)

    def __enter__(self) -> GPUResourceManager:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def _lock(self) -> AbstractContextManager[bool]:
        return self._dispatcher.lock

    @property
    def _managed_models(self) -> dict[str, ManagedModel]:
        return self._dispatcher.managed_models

    # -- models -------------------------------------------------------------------------------------------------

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

        ``load`` places the weights on the device itself; it runs in a thread of its own, with the context of the
        request that it serves and the random numbers of now, so that it makes the same engine whenever it runs.
        `ModelExists` if the name is taken.

        Args:
            keep_warm: seconds on the device after a request; -1: it stays, and never makes room; ``"auto"``.
            idle_timeout: seconds idle until it is released.
            policy: decides instead of those two: a `residency.contracts.Policy` of your own, one object for each model.
                If it raises, that is logged, and from then on it is as if nothing had been said (0, and 600 seconds).
            load_timeout: seconds after which a load is given up (`LoadTimeout`) and the next request loads anew.
            max_waiting: how many requests may wait; further ones get `ModelBusy`. None: any number.
            size_bytes: what it takes on the device, for the budget of the first load; later it is known.
            skip: attribute paths of the engine (``.tokenizer``); what hangs on them is left alone.
            keep: a part of the engine that ``load`` does not build but is given, and that must outlive a release. It
                leaves the device now, is in main memory while released, and is on the device again, and its owner's,
                once the model is unregistered or the manager closed. Until then only the engine may use it.
        """
        if policy is None:
            policy = make_policy(
                self.settings["keep_warm"] if keep_warm is None else keep_warm,
                self.settings["idle_timeout"] if idle_timeout is None else idle_timeout,
            )
        else:
            policy = guarded(policy, keep_warm, idle_timeout)
        load_timeout_s = seconds(load_timeout)
        check_counts(0, max_waiting=max_waiting, size_bytes=size_bytes)
        if isinstance(skip, str):
            raise InvalidInput(f"skip is several paths: give [{skip!r}]", f"skip 是多个路径：请写 [{skip!r}]")
        with self._lock:
            self._check_free_locked(name)
        managed = ManagedModel(
            name,
            load,
            policy,
            skip=tuple(skip),
            random_state=RandomState(),
            load_timeout_s=load_timeout_s,
            max_waiting=math.inf if max_waiting is None else max_waiting,
            size_bytes=size_bytes,
        )
        if keep is not None:
            managed.borrowed_part = BorrowedPart(BorrowedResident(keep, self.device))
        try:
            if managed.borrowed_part is not None:
                managed.borrowed_part.offload()
                managed.host_bytes = managed.borrowed_part.host_bytes
            with self._lock:
                self._check_free_locked(name)
                self._managed_models[name] = managed
        except BaseException:
            self._mover.hand_back(managed)
            raise

    def configure(
        self, name: str | None = None, *, keep_warm: float | str | None = None, idle_timeout: float | str | None = None
    ) -> None:
        """Change how long a model (None: all) stays, from now on and for the idle time that has begun too.

        ``keep_warm`` takes the place of a policy given to `register`; ``idle_timeout`` alone is passed on to it.
        """
        for managed in self._models_named(name):
            with self._lock:
                self._check_open_locked(managed)
                managed.policy = change_policy(managed.policy, keep_warm, idle_timeout)
                self._dispatcher.plan_locked(managed)
            self._dispatcher.act()

    def unregister(self, name: str) -> None:
        """Release a model once its requests have ended and forget it; requests that wait get `UnknownModel`.

        RuntimeError if called by somebody who holds a lease on it.
        """
        managed = self._models_named(name)[0]
        self._refuse_own("unregister()", [managed])
        self._manual_control.retire(
            [managed], UnknownModel(name, tuple(other for other in self.names() if other != name)), math.inf
        )
        with self._lock:
            if self._managed_models.get(name) is managed:
                del self._managed_models[name]

    def names(self) -> tuple[str, ...]:
        """The registered models, in order of registration."""
        with self._lock:
            return tuple(self._managed_models)

    def lease(self, name: str, timeout: float | str | None = None, *, reading: bool = False) -> Lease:
        """A context manager that gives the model's engine, on the device, and takes it back at its end.

        Coroutines write ``async with manager.lease("tts") as engine:``; a plain ``with`` blocks its thread, and with it
        the event loop, until the model is there. A lease of the same model in the same thread of control, and in tasks
        and threads that were started with its context, shares the first, since who waits for them would wait for ever.
        So code that starts a task for each of several separate requests does not take their leases itself: each task
        takes its own, and is started outside of other leases or with ``contextvars.Context().run``.

        The block's end does not wait until a large model has left the device: `status` says ``moving`` until then, and
        `offload` waits for it. A model of at most 64 MB has left, unless that takes longer than a quarter of a second,
        or the block was an ``async with``.

        ``timeout`` is how long to wait for the model at most, from entering until it is there: seconds or ``"30s"``;
        0: not at all; -1: as long as it takes; None: the manager's ``wait_timeout``, which does not count the load.
        With ``reading`` the block runs beside the request that has the model, if one has it: only for reading values.

        Entering raises what the loader raised (every request that waited for that load gets the same error; the
        next one tries again), `DeviceOutOfMemory`, `ManagerClosed`, `RequestTimeout`, `ModelBusy` (a timeout of 0, or
        too many waiting), `RequestCancelled`, `LoadTimeout`, `LeaseDeadlock`, or `EventLoopBlocked`.
        """
        timeout_s = None if timeout is None else seconds(timeout)
        return Lease(self._admission, self._models_named(name)[0], timeout_s, reading)

    # -- steering by hand ---------------------------------------------------------------------------------------

    def offload(self, name: str | None = None) -> bool:
        """Bring a model (None: all) to host memory. True: done; False: follows the running request, or its arrival.

        Of all, each is tried, and then the first error raised.
        """
        return self._each(name, lambda managed: self._manual_control.bring_down(managed, State.HOST))

    def release(self, name: str | None = None) -> bool:
        """Give up a model's memory (None: all) everywhere. Answers as `offload` does."""
        return self._each(name, lambda managed: self._manual_control.bring_down(managed, State.RELEASED))

    def warm(self, name: str | None = None, *, if_idle: bool = False) -> bool:
        """Begin to bring a model (None: all) to the device and return at once. True: it is there already.

        Without a request within `WARM_GRACE_S` it leaves again as after any request; of a model in use, those seconds
        begin when its requests have ended. An `offload` or `release` that was to follow them does not happen. With
        ``if_idle`` a model in use is left alone. A failure is logged and shown in `status`; the next request tries
        again.
        """
        return self._each(name, lambda managed: self._manual_control.warm(managed, if_idle))

    def make_room(self, name: str) -> None:
        """Offload the other models as far as they are idle, and empty the device's caches; for who holds ``name``."""
        self._manual_control.move_aside(managed for managed in self._models_named(None) if managed.name != name)

    # -- looking ------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """Returns the answer of ``GET /gpu/status``: device, host and models in bytes and seconds, None where unknown.

        Never counts as use and never waits for a move.
        """
        device = self.device
        memory, host = device.memory(), self._host.memory()
        self._remeasure()
        with self._lock:
            now_s = self._clock.now()
            self._dispatcher.card.seen(now_s, memory)
            outside_device_bytes, outside_host_bytes = totals(
                managed.outside_memory for managed in self._managed_models.values()
            )
            models = {
                name: describe(managed, now_s, device.kind, device.separate)
                for name, managed in self._managed_models.items()
            }
        return {
            "enabled": True,
            "device": describe_device(device, memory, self.settings["budget_bytes"], outside_device_bytes),
            "host": {
                "total_bytes": host.total_bytes,
                "free_bytes": host.free_bytes,
                "process_bytes": host.process_bytes,
                "outside_bytes": outside_host_bytes,
            },
            "monitor": self._dispatcher.monitor.health(),
            "models": models,
        }

    def _remeasure(self) -> None:
        """Look again at child processes that hold memory outside the books, once a second at most."""
        with self._lock:
            holding = {
                managed: managed.outside_memory
                for managed in self._managed_models.values()
                if managed.outside_memory and managed.outside_memory.holders
            }
            now_s = self._clock.now()
            if not holding or now_s < self._remeasured_s + 1:
                return
            self._remeasured_s = now_s
        for managed, outside in holding.items():
            found = remeasured(outside, self.device)
            with self._lock:
                if managed.outside_memory is outside and found != outside:
                    managed.outside_memory = found
                    self._dispatcher.version += 1

    @property
    def device_lost(self) -> DeviceLost | None:
        """Why the device answers nothing to this process any more, as CUDA does after some errors; None if it does."""
        return self._dispatcher.device_lost

    @property
    def version(self) -> int:
        """A number that is another one whenever `status` has something new to tell, but for times and free memory."""
        return self._dispatcher.version

    def history(self) -> UsageHistory:
        """Returns the answer of ``GET /gpu/history``: counts since the start, the last moves, and 15 minutes of each
        model and of the card.

        Never counts as use and never waits for a move.
        """
        with self._lock:
            now_s, kind = self._clock.now(), self.device.kind
            return {
                "window_s": WINDOW_S,
                "device": self._dispatcher.card.as_dict(now_s),
                "models": {
                    name: managed.history.as_dict(now_s, kind, managed.holder.served_s if managed.holder else None)
                    for name, managed in self._managed_models.items()
                },
            }

    @staticmethod
    def watching(watch: Callable[[Lease], object]) -> AbstractContextManager[None]:
        """A block in which ``watch`` sees each lease that is entered, of any manager, before it waits.

        It holds for what is started with the block's context too. What ``watch`` raises ends the request.
        """
        return watching(watch)

    def subscribe(self, listener: Callable[[Event], Any]) -> Callable[[], None]:
        """Have moves (beginning, progress, end) and changes of queues told to ``listener`` until the answer is called.

        It is called in a thread of its own, in the order in which things happened; what it raises is logged.
        """
        return self._dispatcher.reports.listeners.subscribe(listener)

    def wait_for(self, name: str, state: State, timeout: float | str | None = None) -> bool:
        """Wait until a model is in ``state``; False if it will not be.

        That is if ``timeout`` (real seconds or ``"5s"``) passes first, if its last load or restore has failed (see
        ``last_error`` in `status`) and nothing asks for it, or when it is unregistered or the manager closed.
        """
        managed = self._models_named(name)[0]
        timeout_s = math.inf if timeout is None else seconds(timeout)
        self._dispatcher.watch(
            managed, lambda: managed.state is state or _will_not_come(managed, state), timeout_s, SystemClock()
        )
        return managed.state is state

    # -- the end ------------------------------------------------------------------------------------------------

    def close(self, grace: float | str | None = None) -> bool:
        """Refuse new requests, let the running ones end, release everything and stop the monitor. Idempotent.

        Requests that wait get `ManagerClosed`. A request or a load that still runs after ``grace`` seconds (None or
        -1: as long as it takes) is left alone with its model; then the answer is False. RuntimeError if called by
        somebody who holds a lease, or in a loader.
        """
        grace_s = math.inf if grace is None else seconds(grace)
        self._refuse_own("close()", self._models_named(None))
        self._closed = True
        managed_models = self._models_named(None)
        all_released = self._manual_control.retire(managed_models, ManagerClosed(), grace_s)
        self._dispatcher.monitor.stop()
        self._dispatcher.reports.listeners.close()
        return all_released

    def leave_to_the_parent(self) -> None:
        """For a forked child: nothing here may be touched, not even freed."""
        self._closed = True
        self._parents_models = self._dispatcher.leave()

    def wind_up(self, within_s: float) -> None:
        """At the end of the interpreter: refuse requests, and let moves end that are inside native code."""
        self._closed = True
        clock = SystemClock()
        until_s = clock.now() + within_s
        for managed in self._models_named(None):
            self._dispatcher.watch(managed, partial(_stands, managed), until_s - clock.now(), clock)
        self._dispatcher.monitor.stop()

    # -- helpers ------------------------------------------------------------------------------------------------

    def _models_named(self, name: str | None) -> list[ManagedModel]:
        with self._lock:
            if name is None:
                return list(self._managed_models.values())
            if name not in self._managed_models:
                if self._parents_models:
                    raise ManagerClosed
                raise UnknownModel(name, tuple(self._managed_models))
            return [self._managed_models[name]]

    def _each(self, name: str | None, act: Callable[[ManagedModel], bool]) -> bool:
        """Whether it was done for every model; all are tried before the first error is raised."""
        answers, errors = [], []
        for managed in self._models_named(name):
            try:
                answers.append(act(managed))
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return all(answers)

    def _refuse_own(self, what: str, managed_models: list[ManagedModel]) -> None:
        """RuntimeError where waiting for these models' requests would be waiting for oneself."""
        site = call_site()
        with self._lock:
            kept_busy = (*held_models(), *self._admission.deadlocks.kept_busy_locked(site))
            if any(held is managed for held in kept_busy for managed in managed_models):
                raise RuntimeError(f"{what} would wait for the lease or the load that called it; leave it first.")
            self._admission.deadlocks.refuse_to_block_locked(what, managed_models, site)

    def _check_free_locked(self, name: str) -> None:
        if self._closed:
            raise ManagerClosed
        if name in self._managed_models:
            raise ModelExists(name)

    def _check_open_locked(self, managed: ManagedModel) -> None:
        if self._closed:
            raise ManagerClosed
        if managed.closing:
            raise UnknownModel(managed.name, tuple(self._managed_models))


def _stands(managed: ManagedModel) -> bool:
    return managed.move_task is None


def _will_not_come(managed: ManagedModel, state: State) -> bool:
    """Whether nothing leads a model to ``state`` any more, unless somebody asks for it anew."""
    failed = (
        managed.last_error is not None
        and managed.settled_state is not State.DEVICE
        and not managed.prefetch
        and not managed.in_use
    )
    return _stands(managed) and (managed.closing or (failed and state is not State.RELEASED))


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
        for setting, value in _comparable(**asked).items():
            present = _singleton.settings[setting]
            if value != present:
                raise SettingsConflict(setting, str(present), str(value))
        return _singleton


def _comparable(**settings: Any) -> dict[str, Any]:
    """Settings in one way of writing: ``"5m"`` is 300.0."""
    for name, value in settings.items():
        if name == "keep_warm":
            settings[name] = keep_warm_seconds(value)
        elif name in ("idle_timeout", "wait_timeout"):
            settings[name] = seconds(value)
        elif name == "snapshot_dir" and value is not None:
            settings[name] = Path(value)
    return settings


if __name__ == "__main__":
    from residency.launch.command_line import main

    raise SystemExit(main())
