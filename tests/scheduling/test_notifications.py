"""What the manager says: to the status, the log and listeners; and what a process's end makes of it."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from pathlib import Path

import pytest
from fakes import Client, FakeResident, Gate, Worker, Workshop, after, comes_to, running

import gpu_manager
from gpu_manager import (
    Event,
    GPUResourceManager,
    ModelBusy,
    SettingsConflict,
    SimulatedDevice,
    State,
    get_gpu_manager,
)
from residency import locks
from residency.clock import ManualClock
from residency.errors import DeviceOutOfMemory, InvalidInput
from residency.progress import current


def tts(manager: GPUResourceManager) -> dict:
    return manager.status()["models"]["tts"]


def use(manager: GPUResourceManager, name: str = "tts") -> object:
    with manager.lease(name) as engine:
        return engine


# -- the status -------------------------------------------------------------------------------------------------


def test_the_status_tells_of_the_device_the_host_and_the_monitor(workshop: Workshop) -> None:
    with GPUResourceManager(SimulatedDevice(1000), budget_bytes=400, adopt=workshop.adopt) as manager:
        status = manager.status()
        assert set(status) == {"enabled", "device", "host", "monitor", "models", "isolation", "sharing"}
        assert status["enabled"] is True
        device = status["device"]
        assert (device["kind"], device["total_bytes"], device["free_bytes"]) == ("simulated", 1000, 1000)
        assert (device["budget_bytes"], device["name"]) == (400, "Simulated GPU (1000 B) / 模拟 GPU")
        assert "Simulated" in device["note"]["en"]
        assert set(status["host"]) == {"total_bytes", "free_bytes", "process_bytes", "outside_bytes"}
        assert status["models"] == {}
        assert (status["monitor"]["errors"], status["monitor"]["last_error"]) == (0, None)


@pytest.mark.parametrize("budget_bytes", [0, -1, "24GB", 1.5, True])
def test_a_budget_that_holds_nothing_or_is_no_number_is_refused(budget_bytes: object) -> None:
    with pytest.raises(InvalidInput, match="whole number of at least 1"):
        GPUResourceManager(SimulatedDevice(1000), budget_bytes=budget_bytes)
    GPUResourceManager(SimulatedDevice(1000), budget_bytes=1).close()


def test_there_is_a_new_version_whenever_there_is_something_to_tell(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    versions = [manager.version]

    def tell() -> None:
        versions.append(manager.version)

    gate = workshop.gate = Gate()
    client = Client(manager).queues()
    gate.wait_for_arrival()
    tell()
    for _ in range(2):
        client.managed.move_task.progress.advance(10)
        tell()
    gate.open()
    client.comes_in()
    tell()
    client.leaves()
    tell()
    manager.release()
    tell()
    assert len(set(versions)) == len(versions)


def test_a_monitor_without_models_has_nothing_to_do(manager: GPUResourceManager, clock: ManualClock) -> None:
    use(manager)
    manager.unregister("tts")
    manager._dispatcher.monitor.wake()
    clock.advance(1)
    managed = manager.register("tts", Workshop().load)
    assert use(manager) is not managed
    assert manager.status()["monitor"]["errors"] == 0


def test_the_monitor_survives_an_error_of_its_own_and_says_so(
    manager: GPUResourceManager, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    use(manager)
    managed = manager._managed_models["tts"]

    class Broken:
        name, keep_warm_s, idle_timeout_s = "broken", 0.0, math.inf
        asked = Gate()

        def windows(self) -> tuple[tuple[float, float], ...]:
            self.asked._arrived.set()
            raise ZeroDivisionError("windows")

    policy, managed.policy = managed.policy, Broken()
    clock.advance(600)
    while not Broken.asked._arrived.wait(0.01):
        clock.advance(0)
    managed.policy = policy
    clock.advance(1)
    assert comes_to(manager, clock, State.RELEASED)
    health = manager.status()["monitor"]
    assert health["alive"] is True
    assert health["errors"] >= 1
    assert health["last_error"] == "ZeroDivisionError: windows"
    assert "The idle monitor met an error and goes on" in caplog.text


# -- the process's manager --------------------------------------------------------------------------------------


def test_the_singleton_says_which_setting_differs(tmp_path: Path) -> None:
    settings = {
        "isolation": "none", "keep_warm": "auto", "idle_timeout": "5m", "snapshot_dir": str(tmp_path),
        "snapshot_limit_bytes": 10, "budget_bytes": 400,
    }  # fmt: skip
    others = {
        "isolation": ("process", "none", "process"),
        "keep_warm": (5, "auto", "5.0"),
        "idle_timeout": ("6m", "300.0", "360.0"),
        "snapshot_dir": (tmp_path / "other", str(tmp_path), str(tmp_path / "other")),
        "snapshot_limit_bytes": (11, "10", "11"),
        "budget_bytes": (401, "400", "401"),
    }
    device = SimulatedDevice(1000)
    manager = get_gpu_manager(device, **settings)
    try:
        assert manager.device is device
        assert get_gpu_manager(device, **settings | {"snapshot_dir": tmp_path, "idle_timeout": 300}) is manager
        manager.register("tts", Workshop().load)
        assert (tts(manager)["policy"], tts(manager)["idle_timeout_s"]) == ("auto", 300)
        assert manager.status()["device"]["budget_bytes"] == 400
        for setting, (other, present, asked) in others.items():
            with pytest.raises(SettingsConflict) as caught:
                get_gpu_manager(**{setting: other})
            assert (caught.value.setting, caught.value.present, caught.value.asked) == (setting, present, asked)
        with pytest.raises(SettingsConflict, match="device"):
            get_gpu_manager(SimulatedDevice(2))
        with pytest.raises(InvalidInput):
            get_gpu_manager(idle_timeout="soon")
    finally:
        manager.close()


def test_the_lock_of_the_singleton_is_new_in_a_forked_child() -> None:
    gpu_manager._singleton_lock.acquire()
    locks._renew()
    with get_gpu_manager(SimulatedDevice(1000)) as manager:
        assert manager.names() == ()


def test_auto_can_be_written_in_any_case() -> None:
    with get_gpu_manager(SimulatedDevice(1000), keep_warm="AUTO") as manager:
        assert get_gpu_manager(keep_warm="auto") is manager


def test_the_defaults_of_the_singleton_are_off_at_once_and_ten_minutes() -> None:
    with get_gpu_manager(SimulatedDevice(1000)) as manager:
        manager.register("tts", Workshop().load)
        assert (tts(manager)["keep_warm_s"], tts(manager)["idle_timeout_s"]) == (0, 600)


# -- the log and listeners --------------------------------------------------------------------------------------


def test_the_log_has_every_move_with_bytes_and_seconds(
    manager: GPUResourceManager, clock: ManualClock, workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    workshop.nbytes = 2_500_000
    gate = workshop.gate = Gate()
    client = Client(manager).queues()
    gate.wait_for_arrival()
    clock.advance(2)
    gate.open()
    client.comes_in().leaves()
    manager.release()
    for thread in running("gpu-loading", "gpu-offloading", "gpu-releasing"):
        thread.join(10)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("residency")]
    assert lines == [
        "tts: released -> gpu, 2.38 MB in 2.000 s (Simulated GPU (1 GB) / 模拟 GPU)",
        "tts: gpu -> cpu, 2.38 MB in 0.000 s (Simulated GPU (1 GB) / 模拟 GPU)",
        "tts: cpu -> released, 2.38 MB in 0.000 s (Simulated GPU (1 GB) / 模拟 GPU)",
    ]


def test_the_log_has_what_failed_and_where_the_model_is_now(
    manager: GPUResourceManager, workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    use(manager)
    workshop.resident.fail_next["restore"] = MemoryError("card is full")
    with pytest.raises(MemoryError):
        use(manager)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.ERROR, "tts: restoring failed, back to host: MemoryError: card is full")
    ]


def test_a_load_that_was_given_up_is_in_the_log(
    manager: GPUResourceManager, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    workshop = Workshop()
    manager.register("asr", workshop.load, load_timeout=5)
    gate = workshop.gate = Gate()
    client = Client(manager, "asr").queues()
    gate.wait_for_arrival()
    with pytest.raises(TimeoutError):
        after(clock, 5, client.worker)
    assert [record.getMessage() for record in caplog.records] == ["asr: its loader takes too long and is given up"]
    gate.open()
    for thread in running("gpu-loading-asr"):
        thread.join(60)
    assert "asr: loaded after its time limit; the engine is discarded" in caplog.text
    assert workshop.resident.place == "nowhere"


def test_listeners_hear_of_each_phase_and_of_progress_in_it_ten_times_a_second_at_most(
    manager: GPUResourceManager, clock: ManualClock
) -> None:
    workshop, told = Workshop(), list[Event]()

    def load() -> object:
        for nbytes in (1, 2, 4, 8):
            current().enter("reading", nbytes)
            clock.advance(0.06)
        return workshop.load()

    manager.subscribe(told.append)
    manager.register("asr", load)
    use(manager, "asr")
    manager.close()
    progress = [event for event in told if event.what == "progress"]
    assert [(event.phase, event.total_bytes) for event in progress] == [
        ("building", None), ("reading", 1), ("reading", 4)
    ]  # fmt: skip
    assert {(event.source, event.target, event.done_bytes, event.error) for event in progress} == {
        ("released", "gpu", 0, None)
    }
    assert [round(event.seconds, 6) for event in progress] == [0, 0, 0.12]


def test_the_rate_is_that_of_the_phase(manager: GPUResourceManager, clock: ManualClock) -> None:
    workshop, told, rates = Workshop(), list[Event](), list[float | None]()

    def load() -> object:
        clock.advance(60)
        current().enter("reading", 400)
        rates.append(manager.status()["models"]["asr"]["progress"]["bytes_per_s"])
        clock.advance(2)
        current().advance(300)
        rates.append(manager.status()["models"]["asr"]["progress"]["bytes_per_s"])
        return workshop.load()

    manager.subscribe(told.append)
    manager.register("asr", load)
    use(manager, "asr")
    manager.close()
    assert rates == [None, 150]
    assert [event.bytes_per_s for event in told if event.what == "progress" and event.done_bytes] == [150]


# -- full devices -----------------------------------------------------------------------------------------------


def wrapped(cause: BaseException) -> RuntimeError:
    error = RuntimeError("the engine could not be built")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "places"),
    [
        (DeviceOutOfMemory(100, 40, "a card"), "HHD"),
        (DeviceOutOfMemory(100, 51, "a card"), "HDD"),
        (wrapped(DeviceOutOfMemory(100, 40, "a card")), "HHD"),
        (DeviceOutOfMemory(100, None, "a card"), "HDD"),
        (DeviceOutOfMemory(100, 200, "a card in pieces"), "HDD"),
    ],
)
def test_as_many_idle_models_leave_as_the_device_lacks(
    error: BaseException, places: str, clock: ManualClock, device: SimulatedDevice
) -> None:
    errors = [error]

    def load() -> object:
        if errors:
            raise errors.pop()
        return Workshop().load()

    with GPUResourceManager(device, keep_warm=3600, clock=clock, adopt=Workshop.adopt) as manager:
        for name in ("first", "second"):
            manager.register(name, Workshop(50).load)
            use(manager, name)
            clock.advance(1)
        manager.register("full", load)
        use(manager, "full")
        states = [model["state"] for model in manager.status()["models"].values()]
        assert "".join({"gpu": "D", "cpu": "H"}[state] for state in states) == places


# -- threads, loops and processes -------------------------------------------------------------------------------


def test_a_second_task_of_an_event_loop_is_refused_instead_of_blocking_the_first(manager: GPUResourceManager) -> None:
    async def main() -> None:
        inside = asyncio.Event()

        async def first() -> None:
            with manager.lease("tts"):
                inside.set()
                await asyncio.sleep(0)

        task = asyncio.create_task(first())
        await inside.wait()
        with pytest.raises(RuntimeError, match="another task of this event loop holds 'tts'"):
            use(manager)
        with pytest.raises(ModelBusy), manager.lease("tts", timeout=0):
            pass
        await task

    asyncio.run(main())
    assert use(manager)


def test_where_no_thread_can_be_had_moves_run_in_the_thread_that_needs_them(
    manager: GPUResourceManager, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    engine = use(manager)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        assert use(manager) is engine
        assert tts(manager)["state"] == "cpu"
        assert manager.release() is True
    assert workshop.resident.log == ["offload", "restore", "offload", "release"]


def test_what_was_told_to_register_reaches_who_adopts_the_engine(device: SimulatedDevice) -> None:
    seen = []

    def adopt(engine: object, device: object, managed: object) -> FakeResident:
        seen.append((managed.name, managed.skip))
        return FakeResident()

    with GPUResourceManager(device, adopt=adopt) as manager:
        manager.register("tts", Workshop().load, skip=[".tokenizer"])
        use(manager)
        assert seen == [("tts", (".tokenizer",))]


def test_a_forked_child_has_a_closed_manager_and_touches_nothing(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    child = GPUResourceManager(SimulatedDevice(1000), keep_warm=60, adopt=workshop.adopt)
    child.register("tts", workshop.load)
    told: list[Event] = []
    child.subscribe(told.append)
    lease = child.lease("tts")
    use(child)
    child._dispatcher.notifier.listeners.close()
    count, heard = len(told), []
    child._dispatcher.notifier.listeners._events.append(told[0])
    child._registry.reset_in_child()
    assert child.closed
    assert child.names() == ()
    assert child.status()["monitor"]["alive"] is False
    with pytest.raises(Exception, match="closed"), lease:
        pass
    assert child.close(0) is True
    assert workshop.resident.log == []
    assert child._registry._parents_models["tts"].engine is workshop.engines[0], "it is kept from being collected"
    assert len(told) == count
    child.subscribe(heard.append)
    child._dispatcher.notifier.listeners.close()
    assert not heard, "what was left to tell is the parent's"


def test_the_end_of_the_interpreter_waits_for_moves_but_not_for_ever(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    gate = workshop.gate = Gate()
    client = Client(manager).queues()
    gate.wait_for_arrival()
    manager._registry.wind_up(0.01)
    assert manager.closed
    assert manager.status()["monitor"]["alive"] is False
    assert tts(manager)["state"] == "moving"
    winding = Worker(manager._registry.wind_up, 30)
    winding.join(0.05)
    assert winding.is_alive()
    gate.open()
    client.comes_in()
    winding.result()
    client.leaves()
