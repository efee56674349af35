"""Many threads on one manager, switched by a seed at every lock and every step of every move: no sleeps, no luck.

`python -m pytest tests/scheduling/test_interleavings.py` tries a few hundred interleavings; as many as a night has room
for with ``HYPOTHESIS_PROFILE=nightly``. A failure names its seed, and the same seed fails again.
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from scheduler import Scheduler
from world import SIZES, World

import gpu_manager
from residency import locks
from residency.errors import DeviceOutOfMemory, LeaseDeadlock, OverBudget
from residency.memory import borrowed
from residency.observability import events
from residency.scheduling import dispatcher, managed_model, monitor, move_runner
from residency.states import State

pytestmark = pytest.mark.usefixtures("unmeasured")

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
SEEDS = 150 if NIGHTLY else 6


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Scheduler, World]]:
    def build(seed: int, snapshots: bool = False, **settings: Any) -> tuple[Scheduler, World]:
        scheduler = Scheduler.varied(seed)
        for module in (gpu_manager, dispatcher, move_runner, events, borrowed, locks, monitor, managed_model):
            monkeypatch.setattr(module, "threading", scheduler)
        folder = tmp_path if snapshots else None
        return scheduler, World(seed, scheduler.clock(), step=scheduler.step, snapshot_dir=folder, **settings)

    return build


def run(scheduler: Scheduler, world: World, *phases: list[Callable[[], None]]) -> None:
    """The clients of each phase side by side, one phase after the other, then the end."""

    def main() -> None:
        for clients in phases:
            threads = [scheduler.Thread(target=client) for client in clients]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        world.close()

    scheduler.run(main, invariant=world.check)


SETTINGS = [
    {},
    {"keep_warm": 5},
    {"keep_warm": -1},
    {"budget_bytes": 100},
    {"budget_bytes": 60, "keep_warm": 3},
    {"capacity_bytes": 100},
    {"capacity_bytes": 100, "known": False},
    {"capacity_bytes": 70, "keep_warm": 3},
    {"keep_warm": "auto", "idle_timeout": 50},
    {"snapshots": True, "idle_timeout": 5},
    {"keeps": "tts", "budget_bytes": 100},
    {"keeps": "tts", "snapshots": True, "capacity_bytes": 100},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_without_faults_every_request_is_served(build: Callable, settings: dict) -> None:
    for seed in range(SEEDS):
        scheduler, world = build(seed, **settings)
        choose = random.Random(seed)
        clients = [plain_client(world, choose, first) for first in range(0, 40, 10)]
        run(scheduler, world, [*clients, steering(world, choose)])
        assert world.outcomes == {"served": 12}, (seed, world.outcomes)
        assert set(world.served.values()) == {1}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_with_faults_each_request_ends_in_one_clear_way_and_the_next_is_served(build: Callable, settings: dict) -> None:
    for seed in range(SEEDS):
        scheduler, world = build(seed, fault_rate=0.15, load_timeout=50, listener=True, **settings)
        choose = random.Random(seed)
        leases: list[Any] = []
        clients = [unruly_client(world, choose, first, leases) for first in range(0, 40, 10)]
        before = Counter[str]()

        def peace(world: World = world, before: Counter[str] = before) -> None:
            world.fault_rate = 0.0
            for managed in world.manager._managed_models.values():
                managed.load_timeout_s = math.inf
                if managed.move_task is not None:  # begun before, and as slow as the clock jumps
                    managed.move_task.give_up_at_s = math.inf
            world.await_loaders()
            before.update(world.outcomes)

        after = [plain_client(world, choose, 5000 + number, names=[name]) for number, name in enumerate(SIZES)]
        run(scheduler, world, [*clients, steering(world, choose, leases)], [peace], *([client] for client in after))
        assert sum(before.values()) >= 12
        assert set(world.served.values()) <= {1}
        assert world.outcomes["served"] == before["served"] + len(SIZES), (seed, world.outcomes - before)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_leases_that_are_lost_are_given_back_and_everybody_is_served(build: Callable, settings: dict) -> None:
    for seed in range(SEEDS):
        scheduler, world = build(seed, **settings)
        choose = random.Random(seed)
        clients = [plain_client(world, choose, first) for first in range(0, 20, 10)]
        losers = [careless_client(world, choose) for _ in range(2)]
        after = [plain_client(world, choose, 100 + number, names=[name]) for number, name in enumerate(SIZES)]
        run(scheduler, world, [*clients, *losers, steering(world, choose)], *([client] for client in after))
        # Who holds what was lost a moment ago and waits for another model is in the way of the others.
        refusals = {"OverBudget", "LeaseDeadlock", "DeviceOutOfMemory"}
        assert world.outcomes.keys() <= {"served", *refusals}, (seed, world.outcomes)
        assert sum(world.outcomes.values()) == 6 + len(SIZES)
        assert not any(
            managed.leases.holder or managed.leases.next_request() for managed in world.manager._managed_models.values()
        )


def careless_client(world: World, choose: random.Random) -> Callable[[], None]:
    names = [choose.choice(list(SIZES)) for _ in range(3)]

    def requests() -> None:
        for name in names:
            with suppress(
                LeaseDeadlock, OverBudget, DeviceOutOfMemory
            ):  # what was lost a moment ago may be in the way of the next
                world.manager.lease(name).__enter__()

    return requests


def plain_client(world: World, choose: random.Random, first: int, names: list[str] | None = None) -> Callable[[], None]:
    names = names or [choose.choice(list(SIZES)) for _ in range(3)]

    def requests() -> None:
        for offset, name in enumerate(names):
            world.request(first + offset, name)

    return requests


def unruly_client(world: World, choose: random.Random, first: int, leases: list[Any]) -> Callable[[], None]:
    """Requests with timeouts, requests within requests, and engines that turn out to be broken."""
    plan = [(choose.choice(list(SIZES)), choose.choice([None, None, 0, 1, 30]), choose.random()) for _ in range(3)]

    def requests() -> None:
        for number, (name, timeout, luck) in enumerate(plan, first):
            lease = world.manager.lease(name, timeout)
            leases.append(lease)

            def inside(number: int = number, name: str = name, luck: float = luck, lease: Any = lease) -> None:
                if luck < 0.3:
                    other = list(SIZES)[(list(SIZES).index(name) + 1) % len(SIZES)]
                    world.request(1000 + number, other)
                elif luck < 0.4:
                    lease.discard()

            world.request(number, name, lease, inside)

    return requests


def steering(world: World, choose: random.Random, leases: list[Any] | None = None) -> Callable[[], None]:
    """Somebody who presses buttons."""
    verbs = ["offload", "release", "warm", "status", "configure"] + (
        ["cancel", "make_room"] if leases is not None else []
    )
    presses = [(choose.choice(verbs), choose.choice([None, *SIZES]), choose.choice([0, 2, "auto"])) for _ in range(6)]

    def press() -> None:
        for verb, name, keep_warm in presses:
            if verb == "cancel" and leases:
                choose.choice(leases).cancel()
            elif verb == "status":
                world.manager.status()
            elif verb == "configure":
                world.steer("configure", name, keep_warm=keep_warm)
            elif verb != "cancel":
                world.steer(verb, name or "tts" if verb == "make_room" else name)

    return press


# -- wake-ups that only one thread waits for ------------------------------------------------------------------------


def gated(scheduler: Scheduler, world: World, label: str) -> Any:
    """Stops each thread at that step of the world until the returned lock is released for the first time."""
    gate, step = scheduler.Lock(), world.step
    gate.acquire()

    def gated_step(at: str = "") -> None:
        if at == label:
            with gate:
                pass
        step(at)

    world.step = gated_step
    return gate


def test_a_move_runs_once_although_the_start_of_its_thread_seems_to_fail(build: Callable) -> None:
    for seed in range(SEEDS):
        scheduler, world = build(seed)

        class Interrupted(scheduler.Thread):
            def start(self) -> None:
                super().start()
                if self.name.startswith(("gpu-loading", "gpu-offloading", "gpu-restoring", "gpu-releasing")):
                    raise RuntimeError("the thread runs already")

        scheduler.Thread = Interrupted
        run(scheduler, world, [plain_client(world, random.Random(seed), first) for first in (0, 10)])
        assert world.outcomes == {"served": 6}
        assert all(len(alive) <= 1 for alive in world.alive.values())


def test_the_begin_of_a_move_wakes_a_thread_that_waits_for_it(build: Callable) -> None:
    for seed in range(SEEDS):
        scheduler, world = build(seed)
        gate = gated(scheduler, world, "load begins")

        def waits(world: World = world, gate: Any = gate) -> None:
            assert world.manager.wait_for("tts", State.LOADING)
            gate.release()

        run(scheduler, world, [waits, partial(world.manager.warm, "tts")])


def test_a_load_that_is_given_up_wakes_a_thread_that_waits_for_the_model(build: Callable) -> None:
    for seed in range(SEEDS):
        scheduler, world = build(seed, load_timeout=50)
        gate = gated(scheduler, world, "load begins")

        def waits(world: World = world, gate: Any = gate) -> None:
            assert not world.manager.wait_for("tts", State.DEVICE)
            gate.release()

        run(scheduler, world, [waits, plain_client(world, random.Random(seed), 0, ["tts"])])
        assert world.outcomes == {"LoadTimeout": 1}


def test_a_request_that_arrives_ends_the_wait_of_an_offload_for_another_one(build: Callable) -> None:
    for seed in range(SEEDS):
        scheduler, world = build(seed)
        gate = gated(scheduler, world, "offload begins")

        def offloads(world: World = world, gate: Any = gate) -> None:
            while world.manager._managed_models["tts"].state is not State.OFFLOADING:
                world.step("looking")
            assert not world.manager.offload("tts")
            gate.release()

        run(scheduler, world, [offloads, plain_client(world, random.Random(seed), 0, ["tts", "tts"])])
        assert world.outcomes == {"served": 2}


def test_no_wake_up_of_the_monitor_is_lost(build: Callable) -> None:
    for seed in range(SEEDS * 5):
        scheduler, _world = build(seed)
        lock, clock, due, done = scheduler.RLock(), scheduler.clock(), [], scheduler.Lock()
        done.acquire()

        def act(due: list[int] = due, done: Any = done) -> None:
            if due:
                due.pop()
                done.release()

        def look(due: list[int] = due, clock: Any = clock) -> float:
            return clock.now() if due else math.inf

        idle_monitor = monitor.IdleMonitor(lock, clock, look, act)

        def wakes(idle_monitor: Any = idle_monitor, due: list[int] = due, done: Any = done, lock: Any = lock) -> None:
            try:
                with lock:
                    idle_monitor.expect_locked(math.inf)
                for number in range(3):
                    due.append(number)
                    idle_monitor.wake()
                    done.acquire()
                idle_monitor.stop()
            finally:
                idle_monitor.reset_in_child()  # it goes on after errors, also those that end a run

        scheduler.run(wakes)
