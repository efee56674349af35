"""The manager's promises, with fake residents, a hand-turned clock and no sleeps."""

from __future__ import annotations

import random
import threading

import pytest
from fakes import FakeResident, Gate, Worker, Workshop, await_that

from gpu_manager import (
    CpuDevice,
    GPUResourceManager,
    ManagerClosed,
    ModelExists,
    SettingsConflict,
    SimulatedDevice,
    State,
    UnknownModel,
    get_gpu_manager,
)
from residency.clock import ManualClock
from residency.errors import InvalidInput


def tts(manager: GPUResourceManager) -> dict:
    return manager.status()["models"]["tts"]


def use(manager: GPUResourceManager, name: str = "tts") -> object:
    with manager.lease(name) as engine:
        return engine


# -- lazy load and return ---------------------------------------------------------------------------------------


def test_nothing_is_loaded_before_the_first_lease(manager: GPUResourceManager, workshop: Workshop) -> None:
    manager.status()
    assert workshop.loads == 0
    assert tts(manager)["state"] == "released"


def test_a_lease_gives_the_engine_on_the_device_and_offloads_at_its_end(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    with manager.lease("tts") as engine:
        assert engine is workshop.engines[0]
        assert tts(manager)["state"] == "gpu"
        assert tts(manager)["leases"] == 1
        assert tts(manager)["device_bytes"] == 100
    assert tts(manager)["state"] == "cpu"
    assert tts(manager)["leases"] == 0
    assert tts(manager)["device_bytes"] == 0
    assert tts(manager)["host_bytes"] == 100


def test_the_next_lease_restores_instead_of_loading(manager: GPUResourceManager, workshop: Workshop) -> None:
    assert use(manager) is use(manager)
    assert workshop.loads == 1
    assert workshop.resident.log == ["offload", "restore", "offload"]


def test_the_engine_is_offloaded_when_the_request_fails_too(manager: GPUResourceManager) -> None:
    with pytest.raises(ZeroDivisionError), manager.lease("tts"):
        raise ZeroDivisionError
    assert tts(manager)["state"] == "cpu"
    assert tts(manager)["last_error"] is None


def test_a_lease_within_a_lease_on_the_same_model_gives_the_same_engine(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    with manager.lease("tts") as outer:
        with manager.lease("tts") as inner:
            assert inner is outer
        assert tts(manager)["leases"] == 1
        assert workshop.resident.log == []
    assert workshop.resident.log == ["offload"]


def test_a_lease_can_be_used_once(manager: GPUResourceManager) -> None:
    lease = manager.lease("tts")
    with lease:
        pass
    with pytest.raises(RuntimeError, match=r"^A lease can be used once"), lease:
        pass


def test_an_unknown_model_is_named_with_those_that_are_known(manager: GPUResourceManager) -> None:
    for call in (manager.lease, manager.offload, manager.release, manager.warm):
        with pytest.raises(UnknownModel, match=r"'llm'.*tts"):
            call("llm")


def test_a_name_can_be_registered_once(manager: GPUResourceManager) -> None:
    with pytest.raises(ModelExists, match="tts"):
        manager.register("tts", lambda: None)


def test_loading_leaves_random_numbers_as_they_were(workshop: Workshop, device: SimulatedDevice) -> None:
    def seeding_loader() -> object:
        random.seed(0)
        return workshop.load()

    with GPUResourceManager(device, adopt=workshop.adopt) as manager:
        manager.register("tts", seeding_loader)
        random.seed(42)
        expected = random.random()
        random.seed(42)
        use(manager)
        assert random.random() == expected


# -- keep-warm and idle timeout ---------------------------------------------------------------------------------


def test_keep_warm_delays_the_offload(clock: ManualClock, workshop: Workshop, device: SimulatedDevice) -> None:
    with GPUResourceManager(device, keep_warm="1m", clock=clock, adopt=workshop.adopt) as manager:
        manager.register("tts", workshop.load)
        use(manager)
        clock.advance(59)
        assert tts(manager)["state"] == "gpu"
        assert tts(manager)["idle_s"] == 59
        clock.advance(1)
        assert manager.wait_for("tts", State.HOST, 10)


def test_the_idle_timeout_releases_and_the_next_request_loads_again(
    manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    use(manager)
    clock.advance(600)
    assert manager.wait_for("tts", State.RELEASED, 10)
    assert workshop.resident.log == ["offload", "release"]
    assert tts(manager)["host_bytes"] == 0
    use(manager)
    assert workshop.loads == 2


def test_a_request_starts_the_idle_time_anew(
    manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    use(manager)
    clock.advance(599)
    use(manager)
    clock.advance(599)
    assert tts(manager)["state"] == "cpu"
    assert workshop.loads == 1
    clock.advance(1)
    assert manager.wait_for("tts", State.RELEASED, 10)


def test_status_does_not_count_as_use(manager: GPUResourceManager, clock: ManualClock) -> None:
    use(manager)
    for _ in range(60):
        clock.advance(10)
        manager.status()
    assert manager.wait_for("tts", State.RELEASED, 10)


def test_minus_one_is_never(clock: ManualClock, workshop: Workshop, device: SimulatedDevice) -> None:
    with GPUResourceManager(device, keep_warm=-1, idle_timeout=-1, clock=clock, adopt=workshop.adopt) as manager:
        manager.register("tts", workshop.load)
        use(manager)
        clock.advance(1e9)
        assert tts(manager)["state"] == "gpu"
        assert (tts(manager)["keep_warm_s"], tts(manager)["idle_timeout_s"]) == (-1, -1)


def test_times_can_be_set_per_model(manager: GPUResourceManager, clock: ManualClock) -> None:
    manager.register("asr", Workshop().load, keep_warm=5, idle_timeout="1h")
    status = manager.status()["models"]["asr"]
    assert (status["keep_warm_s"], status["idle_timeout_s"]) == (5, 3600)
    with pytest.raises(InvalidInput, match="soon"):
        manager.register("llm", Workshop().load, keep_warm="soon")


class OnlyAfterTheThird:
    """Stays a minute, once three requests have come after others."""

    name, idle_timeout_s = "third", 3600.0

    def __init__(self, fails: bool = False) -> None:
        self.requests, self.fails = 0, fails

    @property
    def keep_warm_s(self) -> float:
        return 60.0 if self.requests >= 3 else 0.0

    def windows(self) -> tuple[tuple[float, float], ...]:
        return ((0.0, self.keep_warm_s),)

    def idle_ended(self, idle_s: float) -> None:
        self.requests += 1

    def brought_back(self, seconds: float) -> None:
        if self.fails:
            raise ZeroDivisionError

    def with_idle_timeout(self, idle_timeout_s: float) -> OnlyAfterTheThird:
        self.idle_timeout_s = idle_timeout_s
        return self


def test_a_policy_of_ones_own_decides(manager: GPUResourceManager, clock: ManualClock) -> None:
    manager.register("asr", Workshop().load, policy=OnlyAfterTheThird())
    states = []
    for _ in range(4):
        with manager.lease("asr"):
            pass
        states.append(manager.status()["models"]["asr"]["state"])
    assert states == ["cpu", "cpu", "cpu", "gpu"]
    manager.configure("asr", idle_timeout="2m")
    asr = manager.status()["models"]["asr"]
    assert (asr["policy"], asr["keep_warm_s"], asr["idle_timeout_s"]) == ("third", 60, 120)
    clock.advance(60)
    assert manager.wait_for("asr", State.HOST, 10)
    clock.advance(60)
    assert manager.wait_for("asr", State.RELEASED, 10)


def test_a_policy_that_fails_costs_no_request(workshop: Workshop, device: SimulatedDevice) -> None:
    manager = GPUResourceManager(device, adopt=workshop.adopt)  # not the fixture: closing would wait for a lost move
    manager.register("asr", workshop.load, policy=OnlyAfterTheThird(fails=True))
    for _ in range(5):
        assert Worker(use, manager, "asr").result() is not None
    asr = manager.status()["models"]["asr"]
    assert (asr["policy"], asr["state"]) == ("fixed", "cpu"), "it failed when the model came back for the second time"
    manager.close()


def test_a_policy_and_times_are_not_given_together(manager: GPUResourceManager) -> None:
    with pytest.raises(InvalidInput, match="leave those out"):
        manager.register("asr", Workshop().load, keep_warm=0, policy=OnlyAfterTheThird())
    assert manager.names() == ("tts",)


def test_the_monitor_survives_a_move_that_fails_and_tries_again_later(
    manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    workshop_resident_fails_once(manager, workshop, "offload")
    assert tts(manager)["state"] == "gpu"
    assert "no room" in tts(manager)["last_error"]
    clock.advance(30)
    assert manager.wait_for("tts", State.HOST, 10)
    assert tts(manager)["last_error"] is None


def workshop_resident_fails_once(manager: GPUResourceManager, workshop: Workshop, verb: str) -> None:
    with manager.lease("tts"):
        workshop.resident.fail_next[verb] = MemoryError("no room")


# -- by hand ----------------------------------------------------------------------------------------------------


def test_offload_and_release_by_hand(clock: ManualClock, workshop: Workshop, device: SimulatedDevice) -> None:
    with GPUResourceManager(device, keep_warm=-1, clock=clock, adopt=workshop.adopt) as manager:
        manager.register("tts", workshop.load)
        use(manager)
        assert manager.offload("tts") is True
        assert tts(manager)["state"] == "cpu"
        assert manager.release("tts") is True
        assert tts(manager)["state"] == "released"
        assert manager.offload("tts") is True, "a released model needs no offload"
        assert tts(manager)["state"] == "released"


@pytest.mark.parametrize(("ask", "shown", "after"), [("offload", "offload", "cpu"), ("release", "release", "released")])
def test_what_is_asked_for_during_a_request_follows_it(
    ask: str, shown: str, after: str, clock: ManualClock, workshop: Workshop, device: SimulatedDevice
) -> None:
    with GPUResourceManager(device, keep_warm=-1, clock=clock, adopt=workshop.adopt) as manager:
        manager.register("tts", workshop.load)
        with manager.lease("tts"):
            assert getattr(manager, ask)("tts") is False
            assert tts(manager)["pending"] == shown
            assert tts(manager)["state"] == "gpu"
            assert workshop.resident.log == []
        assert tts(manager)["state"] == after
        assert tts(manager)["pending"] is None


def test_release_outweighs_offload_whichever_is_asked_first(manager: GPUResourceManager) -> None:
    with manager.lease("tts"):
        manager.release("tts")
        manager.offload("tts")
        assert tts(manager)["pending"] == "release"
    assert tts(manager)["state"] == "released"


def test_release_asked_during_a_load_follows_the_request(manager: GPUResourceManager, workshop: Workshop) -> None:
    gate = workshop.gate = Gate()
    request = Worker(use, manager)
    gate.wait_for_arrival()
    assert manager.release("tts") is False
    gate.open()
    assert request.result() is workshop.engines[0]
    assert tts(manager)["state"] == "released"


def test_all_models_are_meant_when_none_is_named(manager: GPUResourceManager) -> None:
    manager.register("asr", Workshop().load)
    use(manager)
    use(manager, "asr")
    assert manager.release() is True
    assert {model["state"] for model in manager.status()["models"].values()} == {"released"}


def test_warm_brings_the_model_without_blocking_and_lets_it_go_again(
    manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    gate = workshop.gate = Gate()
    assert manager.warm("tts") is False
    gate.wait_for_arrival()
    assert tts(manager)["state"] == "moving"
    assert manager.warm("tts") is False, "a second call joins the first"
    gate.open()
    assert manager.wait_for("tts", State.DEVICE, 10)
    assert manager.warm("tts") is True
    clock.advance(59)
    assert use(manager) is workshop.engines[0]
    assert workshop.loads == 1


def test_a_warmed_model_that_nobody_uses_is_offloaded(manager: GPUResourceManager, clock: ManualClock) -> None:
    manager.warm("tts")
    assert manager.wait_for("tts", State.DEVICE, 10)
    clock.advance(60)
    assert manager.wait_for("tts", State.HOST, 10)


def test_one_can_wait_for_a_state_for_as_long_as_it_takes(manager: GPUResourceManager) -> None:
    waiting = Worker(manager.wait_for, "tts", State.HOST)
    use(manager)
    assert waiting.result() is True
    assert manager.wait_for("tts", State.DEVICE, 0) is False


# -- many threads -----------------------------------------------------------------------------------------------


def test_a_load_happens_once_however_many_wait_for_it(manager: GPUResourceManager, workshop: Workshop) -> None:
    gate = workshop.gate = Gate()
    requests = [Worker(use, manager) for _ in range(16)]
    gate.wait_for_arrival()
    gate.open()
    assert {id(request.result()) for request in requests} == {id(workshop.engines[0])}
    assert workshop.loads == 1


def test_requests_are_served_one_at_a_time_in_order_of_arrival(manager: GPUResourceManager) -> None:
    served: list[int] = []
    running = threading.Semaphore(1)

    def request(number: int) -> None:
        with manager.lease("tts"):
            assert running.acquire(blocking=False), "two requests ran at once"
            served.append(number)
            running.release()

    requests = []
    managed = manager._managed_models["tts"]
    with manager.lease("tts"):
        for number in range(8):
            requests.append(Worker(request, number))
            assert await_that(manager, managed, lambda n=number: sum(1 for _ in managed.leases.waiting()) == n + 1)
        assert tts(manager)["waiting"] == 8
    for worker in requests:
        worker.result()
    assert served == list(range(8))


def test_a_model_stays_on_the_device_between_requests_that_wait(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    managed = manager._managed_models["tts"]
    with manager.lease("tts"):
        waiting = Worker(use, manager)
        assert await_that(manager, managed, lambda: any(managed.leases.waiting()))
    waiting.result()
    assert workshop.resident.log == ["offload"]


def test_status_answers_while_a_load_runs(manager: GPUResourceManager, workshop: Workshop) -> None:
    gate = workshop.gate = Gate()
    request = Worker(use, manager)
    gate.wait_for_arrival()
    assert tts(manager)["state"] == "moving"
    gate.open()
    request.result()


def test_models_move_independently(manager: GPUResourceManager, workshop: Workshop) -> None:
    manager.register("asr", Workshop().load)
    gate = workshop.gate = Gate()
    request = Worker(use, manager)
    gate.wait_for_arrival()
    use(manager, "asr")
    gate.open()
    request.result()


# -- failures ---------------------------------------------------------------------------------------------------


def test_a_failed_load_raises_what_the_loader_raised_and_the_next_request_tries_again(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    workshop.fail_next = FileNotFoundError("no weights")
    with pytest.raises(FileNotFoundError, match="no weights"):
        use(manager)
    assert tts(manager)["state"] == "released"
    assert tts(manager)["last_error"] == "FileNotFoundError: no weights"
    assert use(manager) is workshop.engines[0]
    assert tts(manager)["last_error"] is None


def test_those_who_wait_for_a_load_that_fails_get_its_error(manager: GPUResourceManager, workshop: Workshop) -> None:
    gate = workshop.gate = Gate()
    workshop.fail_next = OSError("disk on fire")
    requests = [Worker(use, manager) for _ in range(4)]
    gate.wait_for_arrival()
    managed = manager._managed_models["tts"]
    assert await_that(manager, managed, lambda: sum(1 for _ in managed.leases.waiting()) == 4)
    gate.open()
    for request in requests:
        with pytest.raises(OSError, match="disk on fire"):
            request.result()
    assert workshop.loads == 1
    use(manager)


@pytest.mark.parametrize(("ask", "verb", "after"), [("release", None, "released"), ("offload", "restore", "cpu"),
                                                    ("release", "restore", "released")])  # fmt: skip
def test_what_was_asked_for_during_a_move_that_fails_is_not_left_hanging(
    ask: str, verb: str | None, after: str, manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
) -> None:
    gate = Gate()
    if verb is None:
        workshop.gate, workshop.fail_next = gate, OSError("gone")
    else:
        use(manager)
        workshop.resident.gates[verb], workshop.resident.fail_next[verb] = gate, OSError("gone")
    request = Worker(use, manager)
    gate.wait_for_arrival()
    assert getattr(manager, ask)("tts") is False
    gate.open()
    with pytest.raises(OSError, match="gone"):
        request.result()
    assert manager.wait_for("tts", State.RELEASED if after == "released" else State.HOST, 10)
    assert tts(manager)["pending"] is None
    clock.advance(700)
    assert manager.wait_for("tts", State.RELEASED, 10), "the ladder goes on"


def test_a_failed_restore_leaves_the_model_on_the_host(manager: GPUResourceManager, workshop: Workshop) -> None:
    use(manager)
    workshop.resident.fail_next["restore"] = MemoryError("card is full")
    with pytest.raises(MemoryError, match="card is full"):
        use(manager)
    assert tts(manager)["state"] == "cpu"
    assert tts(manager)["host_bytes"] == 100
    assert use(manager) is workshop.engines[0]
    assert workshop.loads == 1


def test_an_engine_that_cannot_be_adopted_is_not_kept(device: SimulatedDevice, workshop: Workshop) -> None:
    failures = [MemoryError("too large")]

    def adopt(engine: object, device: object, managed: object) -> FakeResident:
        if failures:
            raise failures.pop()
        return FakeResident()

    with GPUResourceManager(device, adopt=adopt) as manager:
        manager.register("tts", workshop.load)
        with pytest.raises(MemoryError, match="too large"):
            use(manager)
        assert tts(manager)["state"] == "released"
        use(manager)
        assert workshop.loads == 2


# -- the end ----------------------------------------------------------------------------------------------------


def test_close_releases_everything_and_refuses_new_requests(workshop: Workshop, device: SimulatedDevice) -> None:
    manager = GPUResourceManager(device, keep_warm=-1, adopt=workshop.adopt)
    manager.register("tts", workshop.load)
    use(manager)
    manager.close()
    assert workshop.resident.place == "nowhere"
    assert tts(manager)["state"] == "released"
    with pytest.raises(ManagerClosed):
        use(manager)
    for call in (manager.offload, manager.release, manager.warm):
        with pytest.raises(ManagerClosed):
            call("tts")
    with pytest.raises(ManagerClosed):
        manager.register("asr", workshop.load)
    assert not manager.status()["monitor"]["alive"]
    manager.close()


def test_close_waits_for_the_running_request_and_refuses_those_that_wait(
    workshop: Workshop, device: SimulatedDevice
) -> None:
    manager = GPUResourceManager(device, adopt=workshop.adopt)
    manager.register("tts", workshop.load)
    inside = Gate()

    def long_request() -> str:
        with manager.lease("tts"):
            inside.pass_through()
        return "served"

    running = Worker(long_request)
    inside.wait_for_arrival()
    waiting = Worker(use, manager)
    managed = manager._managed_models["tts"]
    assert await_that(manager, managed, lambda: any(managed.leases.waiting()))
    closing = Worker(manager.close)
    with pytest.raises(ManagerClosed):
        waiting.result()
    assert closing.is_alive()
    assert workshop.resident.log == []
    inside.open()
    assert running.result() == "served"
    closing.result()
    assert workshop.resident.place == "nowhere"


def test_close_within_a_lease_is_refused_instead_of_waiting_for_itself(manager: GPUResourceManager) -> None:
    with manager.lease("tts"), pytest.raises(RuntimeError, match="leave it first"):
        manager.close()


def test_unregister_releases_and_forgets_one_model(manager: GPUResourceManager, workshop: Workshop) -> None:
    manager.register("asr", Workshop().load)
    use(manager)
    use(manager, "asr")
    manager.unregister("asr")
    assert manager.names() == ("tts",)
    assert workshop.resident.place == "host"
    manager.unregister("tts")
    assert workshop.resident.place == "nowhere"
    assert manager.names() == ()
    manager.register("tts", workshop.load)
    use(manager)


# -- a machine without a GPU ------------------------------------------------------------------------------------


def test_on_the_cpu_the_state_is_never_gpu_and_offload_moves_nothing(clock: ManualClock, workshop: Workshop) -> None:
    with GPUResourceManager(CpuDevice(), clock=clock, adopt=workshop.adopt) as manager:
        manager.register("tts", workshop.load)
        with manager.lease("tts"):
            assert tts(manager)["state"] == "cpu"
        assert manager.offload("tts") is True
        assert tts(manager)["state"] == "cpu"
        assert workshop.resident.log == []
        assert "saves nothing" in manager.status()["device"]["note"]["en"]
        assert manager.release("tts") is True
        assert tts(manager)["state"] == "released"
        use(manager)
        clock.advance(600)
        assert manager.wait_for("tts", State.RELEASED, 10)


# -- the process's manager --------------------------------------------------------------------------------------


def test_the_singleton_is_shared_and_refuses_other_settings() -> None:
    manager = get_gpu_manager(idle_timeout=300)
    try:
        assert get_gpu_manager() is manager
        assert get_gpu_manager(idle_timeout="5m") is manager
        with pytest.raises(SettingsConflict, match="idle_timeout") as conflict:
            get_gpu_manager(idle_timeout=301)
        assert (conflict.value.present, conflict.value.asked) == ("300.0", "301.0")
        with pytest.raises(SettingsConflict, match="keep_warm"):
            get_gpu_manager(keep_warm=1)
        with pytest.raises(SettingsConflict, match="device"):
            get_gpu_manager(SimulatedDevice(1))
    finally:
        manager.close()
    with get_gpu_manager() as successor:
        assert successor is not manager


@pytest.mark.parametrize(
    "settings",
    [{"size_bytes": "12GB"}, {"size_bytes": -5}, {"max_waiting": -1}, {"max_waiting": 1.5}, {"skip": ".tokenizer"}],
)
def test_settings_of_a_wrong_kind_are_refused_at_once(
    manager: GPUResourceManager, workshop: Workshop, settings: dict
) -> None:
    with pytest.raises(InvalidInput) as raised:
        manager.register("asr", workshop.load, **settings)
    if "skip" in settings:
        assert str(raised.value) == (
            "skip is several paths: give ['.tokenizer'] / skip 是多个路径：请写 ['.tokenizer']"
        )
    assert manager.names() == ("tts",)
    with pytest.raises(InvalidInput):
        manager.wait_for("tts", State.HOST, "soon")
