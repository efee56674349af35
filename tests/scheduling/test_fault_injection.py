"""One fault at every step of every move: who waited gets it, the next request is served, and nothing leaks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import Gate, Worker, Workshop, await_that, running
from world import SIZES, World

from gpu_manager import DeviceOutOfMemory, GPUResourceManager, LoadTimeout, SimulatedDevice, State
from residency.clock import ManualClock
from residency.scheduling.managed_model import ManagedModel
from residency.scheduling.planner import next_step

pytestmark = pytest.mark.usefixtures("unmeasured")

KINDS: dict[str, Callable[[], BaseException]] = {
    "exception": lambda: OSError("a fault on purpose"),
    "host memory": lambda: MemoryError("a fault on purpose"),
    "device memory": lambda: DeviceOutOfMemory(10, 0, "a fault on purpose"),
    "device lost": lambda: RuntimeError("CUDA error: a fault on purpose"),
    "exit": lambda: SystemExit("a fault on purpose"),
}


class Story:
    """Every kind of move there is, one after the other, on two models that do not fit the device together."""

    def __init__(self, disturb: Callable[[], None], at_step: int, **settings: Any) -> None:
        self.disturb, self.left = disturb, at_step
        self.clock = ManualClock()
        self.world = World(0, self.clock, step=self.step, budget_bytes=100, keep_warm=5, idle_timeout=50, **settings)
        self.answers: list[tuple[str, BaseException | None]] = []
        self.label = ""
        self.failed: list[str] = []
        self.world.manager.subscribe(lambda event: self.failed.append(event.error) if event.error else None)

    def step(self, label: str) -> None:
        self.left -= 1
        if self.left == -1 and label not in ("speaking", "spoken"):
            self.label = label
            self.disturb()

    def do(self, name: str, action: Callable[[], Any]) -> None:
        error = None
        try:
            action()
        except BaseException as raised:
            error = raised
        self.answers.append((name, error))
        self.come_to_rest()

    def use(self, name: str) -> None:
        with self.world.manager.lease(name) as part:
            assert part.place == "device"

    @property
    def managed(self) -> ManagedModel:
        return self.world.manager._managed_models["tts"]

    def come_to_rest(self) -> None:
        manager = self.world.manager
        for name, managed in manager._managed_models.items():
            assert await_that(manager, managed, lambda managed=managed: self.rests(managed)), (
                f"{name} does not come to rest"
            )
        self.world.check_at_rest()

    def rests(self, managed: ManagedModel) -> bool:
        return managed.move_task is None and next_step(managed, self.clock.now(), True) is None

    def tell(self) -> None:
        manager, clock = self.world.manager, self.clock
        for action in (
            ("load", lambda: self.use("tts")),
            ("offload after a while", lambda: clock.advance(6)),
            ("restore", lambda: self.use("tts")),
            ("make room", lambda: self.use("asr")),
            ("offload by hand", lambda: manager.offload("asr")),
            ("warm", lambda: manager.warm("tts")),
            ("release by hand", lambda: manager.release("tts")),
            ("use again", lambda: self.use("asr")),
            ("release after a while", lambda: (clock.advance(40), clock.advance(60))),
        ):
            self.do(*action)


def stories(disturb: Callable[[Story], None], **settings: Any) -> list[Story]:
    """The story, once for each of its steps that can be disturbed."""
    told: list[Story] = []
    for number in range(1000):
        story: Story = Story(lambda: disturb(story), number, **settings)  # noqa: B023 - called while this is the one
        story.tell()
        if story.left >= 0:
            assert len(told) >= 15, "the story is too short"
            story.left = -1
            story.world.close()
            return told
        if story.label:
            told.append(story)
        else:
            story.world.close()
    raise AssertionError("the story has no end")


def world_settings(world: str, folder: Path) -> dict[str, Any]:
    return {"plain": {}, "with snapshots and a part that is kept": {"snapshot_dir": folder, "keeps": "tts"}}[world]


both_worlds = pytest.mark.parametrize("world", ["plain", "with snapshots and a part that is kept"])


@both_worlds
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_any_step_harms_nobody_else(kind: str, world: str, tmp_path: Path) -> None:
    def fail(story: Story) -> None:
        raise KINDS[kind]()

    for story in stories(fail, **world_settings(world, tmp_path)):
        where = f"{kind} at {story.label!r}"
        errors = [(name, error) for name, error in story.answers if error]
        assert all("on purpose" in str(error) for _, error in errors), where
        assert len(errors) <= 1, f"{where}: only who waited for it is told, not {errors}"
        for name in SIZES:
            story.use(name)
        story.come_to_rest()
        story.world.close()
        healed = kind == "device memory" and story.label.startswith(("load", "restore"))
        # Where a snapshot fails, the engine is released, or loaded, the normal way.
        healed |= story.label.startswith(("save", "wake"))
        healed |= world != "plain" and story.label in ("settling", "offload of what is kept")
        assert healed or any("on purpose" in line for line in story.failed), f"{where}: nobody was told"


@both_worlds
def test_a_device_that_is_full_for_a_moment_is_asked_once_more(world: str, tmp_path: Path) -> None:
    def refuse(story: Story) -> None:
        raise DeviceOutOfMemory(10, 0, "fragments")

    for story in stories(refuse, **world_settings(world, tmp_path)):
        if story.label.startswith(("load", "restore")):
            assert not any(error for _, error in story.answers), story.label
        story.world.close()


@both_worlds
@pytest.mark.parametrize("seconds", [1e7, -500.0])
def test_a_clock_that_jumps_at_any_step_harms_nobody(seconds: float, world: str, tmp_path: Path) -> None:
    for story in stories(lambda story: story.clock.advance(seconds), **world_settings(world, tmp_path)):
        assert [error for _, error in story.answers if error] == [], story.label
        story.use("tts")
        story.come_to_rest()
        story.world.close()


def test_a_card_that_is_broken_when_the_manager_closes_leaves_nobody_unreleased() -> None:
    story = Story(lambda: None, 10**6)
    story.use("vad")
    story.use("tts")
    story.world.device.settle = raise_lost  # type: ignore[method-assign]
    story.world.close()


def raise_lost() -> None:
    raise RuntimeError("CUDA error: unspecified launch failure")


# -- loaders that hang ------------------------------------------------------------------------------------------


def test_a_loader_that_hangs_is_given_up_and_what_it_brings_late_is_thrown_away() -> None:
    clock, device, shop = ManualClock(), SimulatedDevice(1000), Workshop()
    manager = GPUResourceManager(device, clock=clock, adopt=shop.adopt)
    manager.register("tts", shop.load, load_timeout=60)
    gate = shop.gate = Gate()
    waiting = [Worker(lambda: manager.lease("tts").__enter__()) for _ in range(3)]
    gate.wait_for_arrival()
    managed = manager._managed_models["tts"]
    assert await_that(manager, managed, lambda: sum(1 for _ in managed.leases.waiting()) == 3)
    clock.advance(59)
    assert manager.status()["models"]["tts"]["state"] == "moving"
    clock.advance(1)
    for request in waiting:
        with pytest.raises(LoadTimeout, match="60"):
            request.result()
    assert manager.status()["models"]["tts"]["state"] == "released"
    with manager.lease("tts") as engine:
        assert engine is shop.engines[0]
    hung = running("gpu-loading-tts")[0]
    gate.open()
    hung.join(10)
    late = shop.engines[1]
    assert late.resident.place == "nowhere"
    with manager.lease("tts") as engine:
        assert engine is shop.engines[0], "the late one takes nobody's place"
    assert manager.close() is True


class Hang:
    """Stops the move that comes to a step, until it may go on; then it goes on, or fails."""

    def __init__(self, error: BaseException | None) -> None:
        self.gate, self.error = Gate(), error

    def __call__(self) -> None:
        self.gate.pass_through()
        if self.error:
            raise self.error


@both_worlds
@pytest.mark.parametrize("end", [None, OSError("the disk went away"), DeviceOutOfMemory(60, 0, "the card")], ids=str)
def test_a_load_that_hangs_at_any_step_is_given_up_and_harms_nobody_however_it_ends(
    end: BaseException | None, world: str, tmp_path: Path
) -> None:
    """While it hangs the next request loads anew, and it ends beside that one, or after the model has left."""
    for number in range(100):
        hang = Hang(end)
        story = Story(hang, 10**6, load_timeout=60, **world_settings(world, tmp_path / str(number)))
        if world != "plain":
            story.use("tts")
            story.come_to_rest()
            story.world.manager.release("tts")
        story.left = number
        request = Worker(story.use, "tts")
        while request.is_alive() and not hang.gate.arrived:
            request.join(0.01)
        if not hang.gate.arrived:
            assert number >= 3, "there are not that few steps"
            story.left = -1
            story.world.close()
            return
        story.clock.advance(60)
        with pytest.raises(LoadTimeout):
            request.result()
        if "what is kept" in story.label:  # nobody can have it meanwhile
            second = Worker(story.use, "tts")
            assert await_that(
                story.world.manager, story.managed, lambda story=story: story.managed.move_task is not None
            )
            story.clock.advance(60)
            with pytest.raises(LoadTimeout):
                second.result()
            hang.gate.open()
        beside = number % 2 == 0
        threads = running("gpu-loading-tts")
        with story.world.manager.lease("tts") as part:
            if beside:
                hang.gate.open()
                for thread in threads:
                    thread.join(60)
            assert part.place == "device"
            story.world.check()
        story.come_to_rest()
        hang.gate.open()
        for thread in threads:
            thread.join(60)
        story.use("tts")
        story.come_to_rest()
        story.world.close()


@pytest.mark.in_process("snapshots are refused with worker processes")
def test_with_snapshots_too_a_loader_that_hangs_takes_nothing_with_it(tmp_path: Path) -> None:
    clock, device, gates = ManualClock(), SimulatedDevice(1 << 30), [Gate()]

    def load() -> torch.nn.Module:
        if gates:
            gates.pop().pass_through()
        return torch.nn.Linear(100, 100)

    manager = GPUResourceManager(device, clock=clock, snapshot_dir=tmp_path)
    manager.register("tts", load, load_timeout=60)
    gate = gates[0]
    request = Worker(lambda: manager.lease("tts").__enter__())
    gate.wait_for_arrival()
    clock.advance(60)
    with pytest.raises(LoadTimeout):
        request.result()
    for _ in range(2):
        with manager.lease("tts") as engine:
            expected = engine.weight.sum().item()
        manager.release("tts")
    hung = running("gpu-loading-tts")[0]
    gate.open()
    hung.join(10)
    with manager.lease("tts") as engine:
        assert engine.weight.sum().item() == expected
    assert manager.close() is True
    assert device.ledger_bytes == 0


# -- engines that break -----------------------------------------------------------------------------------------


def test_an_engine_that_is_said_to_be_broken_is_built_anew(manager: GPUResourceManager, workshop: Workshop) -> None:
    lease = manager.lease("tts")
    with lease:
        lease.discard()
    assert manager.status()["models"]["tts"]["state"] == "released"
    with manager.lease("tts") as engine:
        assert engine is workshop.engines[1]


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (RuntimeError("CUDA error: device-side assert triggered"), State.RELEASED),
        (RuntimeError("CUDA out of memory"), State.HOST),
        (ValueError("no such voice"), State.HOST),
    ],
)
def test_an_error_that_says_the_device_is_lost_discards_the_engine(
    error: Exception, state: State, manager: GPUResourceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager.device, "is_usable", lambda: False)
    with pytest.raises(type(error)), manager.lease("tts"):
        raise error
    assert manager.wait_for("tts", state, 10)


def test_an_engine_that_cannot_come_back_is_built_anew_by_the_next_request(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    with manager.lease("tts"):
        pass
    workshop.resident.fail_next["restore"] = FileNotFoundError("the model's file is gone")
    with pytest.raises(FileNotFoundError), manager.lease("tts"):
        pass
    assert manager.status()["models"]["tts"]["state"] == "cpu", "a failed move is back where it was"
    with manager.lease("tts") as engine:
        assert engine is workshop.engines[1]
    assert workshop.engines[0].resident.place == "nowhere"
