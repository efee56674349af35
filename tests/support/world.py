"""Models with failures at every step, clients, and invariants, around one manager.

Used for random sequences (one thread, one rule at a time) and for random interleavings (many threads under a
`scheduler.Scheduler`, which switches at every `World.step`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_manager import (
    DeviceOutOfMemory,
    GPUResourceManager,
    LeaseDeadlock,
    LoadTimeout,
    ManagerClosed,
    ModelBusy,
    RequestCancelled,
    RequestTimeout,
    SimulatedDevice,
    State,
)
from residency.contracts import Device
from residency.memory import BorrowedPart, CompositeResident
from residency.scheduling.managed_model import ManagedModel

SIZES = {"tts": 60, "asr": 50, "vad": 10}
PLACES = {State.DEVICE: "device", State.HOST: "host", State.RELEASED: "nowhere"}


class Fault(OSError):
    """An injected failure."""


class Loss(Fault, RuntimeError):
    """An injected loss of the device."""


#: Errors that requests and manual control may get after injected failures.
CLEAR = (
    Fault, DeviceOutOfMemory, LeaseDeadlock, LoadTimeout, ManagerClosed, ModelBusy, RequestCancelled, RequestTimeout,
)  # fmt: skip


class Part:
    """A resident that charges the device and has a step before and after each part of a move."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name, self.place = world, name, "nowhere"
        self.nbytes = SIZES[name] - (Kept.nbytes if name == world.keeps else 0)
        self.users = 0
        world.alive[name].append(self)

    @property
    def device_bytes(self) -> int:
        return self.nbytes if self.place == "device" else 0

    @property
    def host_bytes(self) -> int:
        return self.nbytes if self.place == "host" else 0

    def arrive(self, verb: str) -> int:
        if self.place == "device":
            return 0
        self.world.step(f"{verb} begins")
        self.world.maybe_fail(verb)
        self.world.device.charge(self.nbytes)
        try:
            self.world.step(f"{verb} half way")
            self.world.maybe_fail(verb)
        except BaseException:
            self.world.device.refund(self.nbytes)
            raise
        self.place = "device"
        return self.nbytes

    def restore(self) -> int:
        return self.arrive("restore")

    def offload(self) -> int:
        assert not self.users, "moved under a request"
        if self.place != "device":
            return 0
        self.world.step("offload begins")
        self.world.maybe_fail("offload")
        self.place = "host"
        self.world.device.refund(self.nbytes)
        self.world.step("offload ends")
        return self.nbytes

    def release(self) -> int:
        assert not self.users, "released under a request"
        freed_bytes = self.device_bytes + self.host_bytes
        self.world.device.refund(self.device_bytes)
        self.place = "nowhere"
        if self in self.world.alive[self.name]:
            self.world.alive[self.name].remove(self)
        self.world.step("released")
        return freed_bytes

    def save(self, store: Any, name: str) -> int:
        assert not self.users, "released under a request"
        self.world.step("save begins")
        self.world.maybe_fail("save")
        self.world.device.refund(self.device_bytes)
        self.place = "nowhere"
        return self.nbytes

    def load(self, store: Any, name: str) -> int:
        self.world.step("wake begins")
        self.world.maybe_fail("wake")
        self.place = "host"
        self.world.step("wake ends")
        return self.nbytes


class Kept(BorrowedPart):
    """A resident that outlives a release, shared by successive engines of one model."""

    nbytes = 5

    def __init__(self, world: World) -> None:
        self.world, self.place = world, "host"
        super().__init__({}, SimulatedDevice(1))

    @property
    def device_bytes(self) -> int:
        return self.nbytes if self.place == "device" else 0

    @property
    def host_bytes(self) -> int:
        return self.nbytes if self.place == "host" else 0

    def restore(self) -> int:
        if self.place != "host":
            return 0
        self.world.step("restore of what is kept")
        self.world.maybe_fail("restore of what is kept")
        self.world.device.charge(self.nbytes)
        self.place = "device"
        return self.nbytes

    def offload(self) -> int:
        if self.place != "device":
            return 0
        self.world.step("offload of what is kept")
        self.place = "host"
        self.world.device.refund(self.nbytes)
        return self.nbytes

    def hand_back(self) -> None:
        with self.lock:
            self.restore()
            self.world.device.refund(self.device_bytes)
            self.place, self.loan = "its owner's", None


def place_of(managed: ManagedModel) -> str:
    """Returns the place of the engine, without that of its borrowed part."""
    if managed.resident is None:
        return "nowhere"
    resident: Any = managed.resident
    return resident.parts[-1].place if isinstance(resident, CompositeResident) else resident.place


class Card(SimulatedDevice):
    """A simulated card that can fail when its driver frees memory."""

    def __init__(self, world: World, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self.world = world

    def is_usable(self) -> bool:
        return False  # called after a `Loss` only

    def settle(self) -> None:
        self.world.step("settling")
        self.world.maybe_fail("settling")


class World:
    """``step`` is called wherever a switch may happen; ``fault_rate`` is the probability of a failure in a step.

    With ``snapshot_dir`` released engines stay as skeletons; the model ``keeps`` has a part that outlives a release.
    """

    def __init__(
        self,
        seed: int,
        clock: Any,
        *,
        step: Callable[[str], None] = lambda label: None,
        budget_bytes: int | None = None,
        capacity_bytes: int = 1000,
        fault_rate: float = 0.0,
        keep_warm: float | str = 0,
        idle_timeout: float = 600,
        load_timeout: float = -1,
        listener: bool = False,
        known: bool = True,
        snapshot_dir: Path | None = None,
        keeps: str | None = None,
    ) -> None:
        self.random = random.Random(f"world {seed}")
        self.step, self.fault_rate, self.load_timeout = step, fault_rate, load_timeout
        self.loading = 0
        self.keeps, self.kept = keeps, Kept(self)
        self.device = Card(self, capacity_bytes)
        self.alive: dict[str, list[Part]] = {name: [] for name in SIZES}
        self.outcomes: Counter[str] = Counter()
        self.served: Counter[int] = Counter()
        self.budget_bytes = budget_bytes
        self.manager = GPUResourceManager(
            self.device, clock=clock, adopt=self.adopt, budget_bytes=budget_bytes, keep_warm=keep_warm,
            idle_timeout=idle_timeout, snapshot_dir=snapshot_dir,
        )  # fmt: skip
        if listener:
            self.manager.subscribe(lambda event: self.maybe_fail("listener"))
        for name, size in SIZES.items():
            self.manager.register(name, self.loader(name), load_timeout=load_timeout, size_bytes=size if known else 0)
        if keeps is not None:
            managed = self.manager._managed_models[keeps]
            managed.borrowed_part, managed.memory.host_bytes = self.kept, self.kept.host_bytes

    def maybe_fail(self, verb: str) -> None:
        if self.random.random() < self.fault_rate:
            raise self.random.choice(
                [Fault(f"{verb} failed"), Loss(f"CUDA error in {verb}"), DeviceOutOfMemory(10, 0, "the world")]
            )

    def loader(self, name: str) -> Callable[[], Any]:
        def load() -> Part:
            self.loading += 1
            try:
                self.step("load begins")
                self.maybe_fail("load")
                part = Part(self, name)
                try:
                    part.arrive("load")
                except BaseException:
                    self.alive[name].remove(part)
                    raise
                return part
            finally:
                self.loading -= 1

        return load

    def adopt(self, engine: Any, device: Device, managed: ManagedModel) -> Any:
        return engine

    # -- what clients do ----------------------------------------------------------------------------------------

    def request(self, number: int, name: str, lease: Any = None, inside: Callable[[], None] = lambda: None) -> None:
        """Sends one request; it ends in exactly one outcome."""
        try:
            with lease or self.manager.lease(name) as part:
                assert part.name == name
                assert part.place == "device", "the engine is not where it should be"
                part.users += 1
                try:
                    assert part.users == 1, "two requests in one engine"
                    self.step("speaking")
                    inside()
                    self.step("spoken")
                    assert part.place == "device", "the engine was moved while it spoke"
                    self.served[number] += 1
                finally:
                    part.users -= 1
        except CLEAR as error:
            self.outcomes[type(error).__name__] += 1
        else:
            self.outcomes["served"] += 1

    def steer(self, verb: str, *arguments: Any, **keywords: Any) -> Any:
        """Runs a manual move, which may meet an injected failure."""
        try:
            return getattr(self.manager, verb)(*arguments, **keywords)
        except CLEAR as error:
            return error

    # -- what must always hold ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Checks the invariants that hold at any time."""
        managed_models = self.manager._managed_models
        for name, managed in managed_models.items():
            parts = self.alive[name]
            if managed.leases.holder is not None and managed.leases.holder.users:
                assert managed.state is State.DEVICE, f"{name} is leased and {managed.state}"
                assert place_of(managed) == "device"
                assert name != self.keeps or self.kept.place == "device", "what is kept left under a request"
            if managed.move_task is None:
                assert place_of(managed) == PLACES[managed.settled_state], f"{name} is not there"
            assert len(parts) <= 1 or self.load_timeout != -1, f"{name} was loaded twice"
            assert len(set(managed.leases.requests)) == len(managed.leases.requests)
            numbers = [request.number for request in managed.leases.requests]
            assert numbers == sorted(numbers), "somebody jumped the queue"
        held = self.kept.device_bytes + sum(part.device_bytes for parts in self.alive.values() for part in parts)
        assert held <= self.device.ledger_bytes <= self.device.capacity_bytes
        if self.budget_bytes is not None:
            claimed = sum(managed.memory.size_bytes for managed in managed_models.values() if managed.on_device)
            assert claimed <= self.budget_bytes, f"{claimed} bytes of {self.budget_bytes}"

    def check_at_rest(self) -> None:
        """Checks the invariants that hold without requests and moves."""
        self.check()
        for name, managed in self.manager._managed_models.items():
            assert managed.move_task is None
            assert not managed.leases.in_use, f"somebody still uses {name}"
            assert not managed.memory.waiting_for_room
            left = managed.resident or managed.borrowed_part
            if left is not managed.borrowed_part or self.load_timeout == -1:  # an abandoned load may hold it
                assert managed.memory.device_bytes == (left.device_bytes if left else 0)
                assert managed.memory.host_bytes == (left.host_bytes if left else 0)
        if (
            self.load_timeout == -1
            and self.keeps
            and self.manager._managed_models[self.keeps].settled_state is not State.DEVICE
        ):
            assert self.kept.place == "host", "what is kept stays on the device alone"
        held = self.kept.device_bytes + sum(part.device_bytes for parts in self.alive.values() for part in parts)
        assert self.device.ledger_bytes == held

    def await_loaders(self) -> None:
        """Waits for abandoned loaders that have not noticed yet."""
        managed_models = self.manager._managed_models
        while self.loading or any(
            len(parts) > (managed_models[name].move_task is not None or managed_models[name].resident is not None)
            for name, parts in self.alive.items()
        ):
            self.step("waiting for loaders")

    def close(self) -> None:
        """Closes the manager; checks that nothing remains."""
        self.fault_rate = 0.0
        assert self.manager.close()
        while self.loading or (self.load_timeout != -1 and any(self.alive.values())):
            self.step("waiting for loaders")
        assert self.device.ledger_bytes == 0
        assert not any(self.alive.values()), "an engine was left behind"
        assert {model["state"] for model in self.manager.status()["models"].values()} <= {"released"}
