"""Several models that do not fit on the device together: who leaves, who waits, who is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from fakes import Client, Gate, Worker, Workshop, after, await_that, comes_to

from gpu_manager import DeviceOutOfMemory, GPUResourceManager, SimulatedDevice, State
from residency.clock import ManualClock
from residency.contracts import Memory
from residency.scheduling.dispatcher import RETRY_AFTER_S
from residency.scheduling.managed_model import ManagedModel
from residency.scheduling.move_runner import FREED_WITHIN_S

pytestmark = pytest.mark.usefixtures("unmeasured")

House = Callable[..., GPUResourceManager]


@pytest.fixture
def house(clock: ManualClock) -> Iterator[House]:
    """Models of 100 bytes under a budget: ``house(200, "a", "b", asr=dict(keep_warm=-1))``. They stay for an hour."""
    made: list[GPUResourceManager] = []

    def build(budget_bytes: int | None, *names: str, device: object = None, **special: dict) -> GPUResourceManager:
        manager = GPUResourceManager(
            device or SimulatedDevice(10_000), keep_warm=3600, idle_timeout=-1, clock=clock, adopt=Workshop.adopt,
            budget_bytes=budget_bytes,
        )  # fmt: skip
        made.append(manager)
        for name in (*names, *special):
            settings = {"nbytes": 100, "size_bytes": 100} | special.get(name, {})
            manager.register(name, Workshop(settings.pop("nbytes")).load, **settings)
        return manager

    yield build
    for manager in made:
        assert manager.close()


def where(manager: GPUResourceManager) -> str:
    """Where the models are, in order of registration: on the device, host, or released; ``*`` for on the way."""
    letters = {"gpu": "D", "cpu": "H", "released": "-", "moving": "*"}
    return "".join(letters[model["state"]] for model in manager.status()["models"].values())


def use(manager: GPUResourceManager, *names: str) -> None:
    for name in names:
        manager._dispatcher.clock.advance(1)
        with manager.lease(name) as engine:
            assert engine.resident.place == "device"


# -- who leaves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "places"), [("abc", "HDD"), ("bac", "DHD"), ("abac", "DHD"), ("abca", "DHD")])
def test_the_one_unused_for_longest_leaves(order: str, places: str, house: House) -> None:
    manager = house(200, "a", "b", "c")
    use(manager, *order)
    assert where(manager) == places


def test_nobody_leaves_while_there_is_room_and_no_more_than_needed(house: House) -> None:
    manager = house(300, "a", "b", c={"nbytes": 250, "size_bytes": 250}, d={"nbytes": 200, "size_bytes": 200})
    use(manager, "a", "b")
    assert where(manager) == "DD--"
    use(manager, "d")
    assert where(manager) == "HD-D"
    use(manager, "c")
    assert where(manager) == "HHDH"


def test_a_model_in_use_never_leaves(house: House) -> None:
    manager = house(200, "a", "b", "c")
    holder = Client(manager, "a").comes_in()
    use(manager, "b", "c")
    assert where(manager) == "DHD"
    assert holder.leaves().resident.log == []


def test_a_pinned_model_never_leaves(house: House) -> None:
    manager = house(200, "b", "c", pinned={"keep_warm": -1})
    use(manager, "pinned", "b", "c")
    assert where(manager) == "HDD"
    manager.configure("b", keep_warm=-1)
    manager.configure("c", keep_warm=-1)
    with pytest.raises(DeviceOutOfMemory, match="budget") as caught:
        use(manager, "b")
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (100, 0)
    assert where(manager) == "HDD"
    manager.configure("c", keep_warm=0)
    use(manager, "b")
    assert where(manager) == "DHD"


def test_without_a_budget_everybody_stays(house: House) -> None:
    manager = house(None, "a", "b", "c")
    use(manager, "a", "b", "c")
    assert where(manager) == "DDD"
    assert manager.status()["device"]["budget_bytes"] is None


def test_the_size_of_the_device_is_a_budget_too(house: House) -> None:
    manager = house(1000, "a", "b", "c", device=SimulatedDevice(250))
    use(manager, "a", "b", "c")
    assert where(manager) == "HDD"


# -- who waits --------------------------------------------------------------------------------------------------


def test_who_needs_the_room_of_a_model_in_use_waits_for_it(house: House, clock: ManualClock) -> None:
    manager = house(150, "a", "b")
    holder = Client(manager, "a").comes_in()
    waiting = Client(manager, "b").queues()
    assert where(manager) == "D-"
    holder.leaves()
    waiting.comes_in()
    assert where(manager) == "HD"
    waiting.leaves()


def how_many_wait(managed: ManagedModel) -> int:
    return sum(1 for _ in managed.leases.waiting())


def test_requests_for_several_models_are_served_in_order_of_arrival(house: House) -> None:
    manager = house(100, "a", "b", "c")
    served: list[str] = []

    def request(name: str) -> None:
        with manager.lease(name):
            served.append(name)

    holder = Client(manager, "a").comes_in()
    workers = []
    for number, name in enumerate("bacbca", 1):
        workers.append(Worker(request, name))
        managed = manager._managed_models[name]
        assert await_that(
            manager, managed, lambda n=number: n == sum(map(how_many_wait, manager._managed_models.values()))
        )
    holder.leaves()
    for worker in workers:
        worker.result()
    assert "".join(served) == "bacbca"


def test_a_younger_request_does_not_take_the_room_an_older_one_waits_for(house: House) -> None:
    manager = house(200, "a", "small", large={"nbytes": 200, "size_bytes": 200})
    holder = Client(manager, "a").comes_in()
    old = Client(manager, "large").queues()
    young = Client(manager, "small").queues()
    assert where(manager) == "D--"
    holder.leaves()
    old.comes_in()
    assert where(manager) == "H-D"
    old.leaves()
    young.comes_in().leaves()


def test_who_waits_for_room_can_be_cancelled_and_the_next_gets_it(house: House) -> None:
    manager = house(200, "a", "small", large={"nbytes": 200, "size_bytes": 200})
    holder = Client(manager, "a").comes_in()
    old = Client(manager, "large").queues()
    young = Client(manager, "small").queues()
    assert old.lease.cancel()
    young.comes_in().leaves()
    holder.leaves()
    assert where(manager) == "DD-"


def test_who_holds_the_room_that_they_need_is_refused(house: House) -> None:
    manager = house(100, "a", "b")
    with manager.lease("a"), pytest.raises(DeviceOutOfMemory, match="budget"):
        use(manager, "b")
    use(manager, "b")


# -- sizes ------------------------------------------------------------------------------------------------------


def test_a_first_load_of_unknown_size_goes_over_budget_and_the_idle_ones_leave_afterwards(house: House) -> None:
    manager = house(150, "a", unknown={"size_bytes": 0})
    use(manager, "a")
    with manager.lease("unknown"):
        assert manager.wait_for("a", State.HOST, 10)
    assert where(manager) == "HD"
    use(manager, "a")
    assert where(manager) == "DH", "now its size is known"


def test_who_went_over_the_budget_leaves_when_its_request_ends(house: House, clock: ManualClock) -> None:
    manager = house(150, a={"size_bytes": 0}, b={"size_bytes": 0})
    first = Client(manager, "a").comes_in()
    use(manager, "b")
    assert comes_to(manager, clock, State.HOST, "b"), "it would have stayed for an hour"
    first.leaves()
    assert where(manager) == "DH"


def test_a_size_that_was_told_makes_room_before_the_first_load(house: House) -> None:
    manager, workshop = house(150, "a"), Workshop()
    manager.register("told", workshop.load, size_bytes=100)
    use(manager, "a")
    gate = workshop.gate = Gate()
    worker = Worker(use, manager, "told")
    gate.wait_for_arrival()
    assert where(manager) == "H*"
    gate.open()
    worker.result()


@pytest.mark.parametrize("told", [True, False])
def test_a_model_larger_than_the_budget_is_refused_by_name_of_the_budget(told: bool, house: House) -> None:
    manager = house(150, "a", big={"nbytes": 300, "size_bytes": 300 * told})
    use(manager, "a")
    if not told:
        use(manager, "big")
        assert manager.wait_for("big", State.HOST, 10), "now it is known, and it leaves with the others"
        use(manager, "a")
    with pytest.raises(DeviceOutOfMemory, match="Raise it") as caught:
        use(manager, "big")
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (300, 50)
    assert where(manager) == ("D-" if told else "DH"), "nobody had to leave for it"
    assert "OverBudget" in manager.status()["models"]["big"]["last_error"]
    use(manager, "a")


def test_a_model_that_the_budget_will_not_hold_again_is_named_at_once(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    manager = house(150, big={"nbytes": 300})
    use(manager, "big")
    assert "big takes 300 bytes, more than the budget of 150" in caplog.text
    assert "--gpu-budget" in caplog.text


# -- what nobody waits for --------------------------------------------------------------------------------------


def test_warming_sends_idle_models_away_but_waits_for_nobody(house: House) -> None:
    manager = house(100, "a", "b")
    use(manager, "a")
    assert manager.warm("b") is False
    assert manager.wait_for("b", State.DEVICE, 10)
    assert where(manager) == "HD"
    holder = Client(manager, "b").comes_in()
    assert manager.warm("a") is False
    assert where(manager) == "HD"
    assert "budget" in manager.status()["models"]["a"]["last_error"]
    holder.leaves()
    assert where(manager) == "HD", "it was refused, and is not brought later"


@dataclass
class Windows:
    """Off at once, and back between 40 and 400 seconds later."""

    name: str = "windows"
    keep_warm_s: float = 0.0
    idle_timeout_s: float = math.inf
    gaps: list[float] = field(default_factory=list)
    restores: list[float] = field(default_factory=list)

    def windows(self) -> tuple[tuple[float, float], ...]:
        return ((0.0, 0.0), (40.0, 400.0))

    def idle_ended(self, idle_s: float) -> None:
        self.gaps.append(idle_s)

    def brought_back(self, seconds: float) -> None:
        self.restores.append(seconds)


def test_a_policy_brings_back_its_model_for_which_nobody_has_to_leave(house: House, clock: ManualClock) -> None:
    manager = house(100, "a", "b")
    policy = manager._managed_models["b"].policy = Windows()
    use(manager, "b", "a")
    assert where(manager) == "DH"
    clock.advance(38.5)
    assert manager.status()["models"]["b"]["next"] == {"to": "gpu", "in_s": 0.5}
    clock.advance(0.5)
    managed = manager._managed_models["b"]
    assert any(
        manager.wait_for("b", State.RESTORING, 0.01) or managed.times.policy_paused_until_s > clock.now()
        for _ in nudged(clock)
    )
    assert where(manager) == "DH"
    assert manager.status()["models"]["b"]["last_error"] is None
    manager.offload("a")
    clock.advance(RETRY_AFTER_S - 1)
    assert where(manager) == "HH"
    clock.advance(1)
    assert comes_to(manager, clock, State.DEVICE, "b")
    assert policy.restores == [0]
    clock.advance(5)
    use(manager, "b")
    assert policy.gaps == [76], "since its last request, whatever it did meanwhile"
    assert manager.status()["models"]["b"]["last_error"] is None


def test_a_policy_brings_nothing_back_that_was_sent_away_by_hand(house: House, clock: ManualClock) -> None:
    manager = house(None, "a")
    manager._managed_models["a"].policy = Windows()
    with manager.lease("a"):
        assert manager.offload("a") is False
    clock.advance(39)
    assert manager.status()["models"]["a"]["next"] is None
    use(manager, "a")
    assert manager.status()["models"]["a"]["next"] == {"to": "gpu", "in_s": 40}
    manager.warm("a")
    assert manager.wait_for("a", State.DEVICE, 10)
    assert manager.offload("a") is True
    assert manager.status()["models"]["a"]["next"] is None


def nudged(clock: ManualClock) -> Iterator[None]:
    """For whoever was just about to look at the clock."""
    for _ in range(500):
        clock.advance(0)
        yield


# -- memory that is shown late ----------------------------------------------------------------------------------


class SlowDriver(SimulatedDevice):
    """A device that shows memory as free when the test says so."""

    def __init__(self) -> None:
        super().__init__(10_000)
        self.shown: int | None = 10_000
        self.asked = Gate()
        self.waits: Callable[[], bool] = lambda: False

    def memory(self) -> Memory:
        if hasattr(self, "waits"):
            if self.waits():  # others look, too
                self.asked._arrived.set()
            return Memory(self.capacity_bytes, self.shown, 0)
        return super().memory()


@pytest.mark.parametrize("shown", [0, 99, 100, None])
def test_who_others_left_for_waits_until_the_driver_shows_it_but_not_for_ever(
    shown: int | None, house: House, clock: ManualClock
) -> None:
    device = SlowDriver()
    manager = house(100, "a", "b", device=device)
    use(manager, "b", "a")
    log = manager._managed_models["b"].resident.log
    device.shown, device.asked = 0, Gate()
    device.waits = lambda: manager._managed_models["b"].move_task is not None
    worker = Worker(use, manager, "b")
    while not device.asked._arrived.wait(0.01) and len(log) == 1:
        clock.advance(0)
    assert log == ["offload"]
    device.shown = shown
    enough = shown is None or shown >= 100
    if not enough:
        clock.advance(FREED_WITHIN_S - 0.1)
        device.asked = Gate()
        while not device.asked._arrived.wait(0.01):
            clock.advance(0)
        assert log == ["offload"]
    after(clock, 0 if enough else 0.1, worker)
    assert log == ["offload", "restore"]
