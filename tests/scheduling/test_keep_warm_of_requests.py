"""How long a model stays on the device after a request that says so itself."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from fakes import Client, FakeResident, Workshop, comes_to

from gpu_manager import CpuDevice, GPUResourceManager, SimulatedDevice, State
from residency.clock import ManualClock
from residency.errors import InvalidInput
from residency.scheduling.adaptive import AdaptivePolicy

pytestmark = pytest.mark.usefixtures("unmeasured")


def use(manager: GPUResourceManager, name: str = "tts", **lease: Any) -> None:
    with manager.lease(name, **lease):
        pass


def tts(manager: GPUResourceManager) -> Any:
    return manager.status()["models"]["tts"]


def stays_until(manager: GPUResourceManager, clock: ManualClock, seconds: float, then: State = State.HOST) -> None:
    """Checks that the model leaves ``seconds`` from now, and not before."""
    assert tts(manager)["next"]["in_s"] == seconds
    clock.advance(seconds - 0.001)
    assert tts(manager)["state"] == "gpu"
    clock.advance(0.001)
    assert comes_to(manager, clock, then)


@pytest.mark.parametrize("keep_warm", [300, "5m", "4m60s"])
def test_the_model_stays_as_long_as_the_request_says(
    keep_warm: Any, manager: GPUResourceManager, clock: ManualClock
) -> None:
    use(manager, keep_warm=keep_warm)
    assert (tts(manager)["keep_warm_s"], tts(manager)["keep_warm_by"]) == (300, "request")
    stays_until(manager, clock, 300)


def test_the_next_request_is_the_one_that_counts(manager: GPUResourceManager, clock: ManualClock) -> None:
    manager.configure("tts", keep_warm=20)
    use(manager, keep_warm=300)
    clock.advance(10)
    use(manager, keep_warm="1m")
    clock.advance(10)
    assert tts(manager)["next"] == {"to": "cpu", "in_s": 50}
    use(manager)
    assert (tts(manager)["keep_warm_s"], tts(manager)["keep_warm_by"]) == (20, "policy")
    stays_until(manager, clock, 20)


def test_with_0_it_leaves_at_once_whatever_the_policy_says(manager: GPUResourceManager, clock: ManualClock) -> None:
    manager.configure("tts", keep_warm=-1)
    use(manager, keep_warm=0)
    assert comes_to(manager, clock, State.HOST)
    assert tts(manager)["keep_warm_s"] == 0
    use(manager)
    clock.advance(1e6)
    assert (tts(manager)["state"], tts(manager)["next"], tts(manager)["keep_warm_s"]) == ("gpu", None, -1)


@pytest.mark.parametrize("endless", [-1, "-1", "-1m", math.inf])
def test_with_minus_1_it_stays_until_a_person_says_otherwise(
    endless: Any, manager: GPUResourceManager, clock: ManualClock
) -> None:
    use(manager, keep_warm=endless)
    clock.advance(1e6)
    assert (tts(manager)["state"], tts(manager)["keep_warm_s"], tts(manager)["next"]) == ("gpu", -1, None)
    assert manager.offload("tts")
    assert tts(manager)["state"] == "cpu"
    assert tts(manager)["next"] == {"to": "released", "in_s": 600}, "the idle timeout begins now"
    manager.configure("tts", idle_timeout=60)
    clock.advance(60)
    assert comes_to(manager, clock, State.RELEASED)


def test_the_release_waits_for_the_stay_on_the_device_only(manager: GPUResourceManager, clock: ManualClock) -> None:
    use(manager, keep_warm="1h")
    stays_until(manager, clock, 3600, State.RELEASED)
    use(manager, keep_warm="1h")
    clock.advance(100)
    manager.offload("tts")
    assert tts(manager)["next"] == {"to": "released", "in_s": 600}
    use(manager, keep_warm="10s")
    clock.advance(10)
    assert comes_to(manager, clock, State.HOST)
    assert tts(manager)["next"] == {"to": "released", "in_s": 590}


def test_a_person_who_configures_has_the_last_word(manager: GPUResourceManager, clock: ManualClock) -> None:
    use(manager, keep_warm=-1)
    manager.configure("tts", idle_timeout="1h")
    assert (tts(manager)["keep_warm_s"], tts(manager)["idle_timeout_s"]) == (-1, 3600)
    manager.configure("tts", keep_warm=30)
    assert (tts(manager)["keep_warm_s"], tts(manager)["keep_warm_by"]) == (30, "policy")
    stays_until(manager, clock, 30)


def test_what_is_warmed_afterwards_stays_as_the_policy_says(manager: GPUResourceManager, clock: ManualClock) -> None:
    manager.configure("tts", keep_warm=200)
    use(manager, keep_warm=0)
    assert comes_to(manager, clock, State.HOST)
    manager.warm("tts")
    assert comes_to(manager, clock, State.DEVICE)
    assert tts(manager)["next"] == {"to": "cpu", "in_s": 200}


def test_an_offload_that_waits_for_the_request_comes_first(manager: GPUResourceManager, clock: ManualClock) -> None:
    with manager.lease("tts", keep_warm=300):
        assert not manager.offload("tts")
    assert comes_to(manager, clock, State.HOST)


def test_a_request_that_is_refused_says_nothing(manager: GPUResourceManager, clock: ManualClock) -> None:
    use(manager, keep_warm=300)
    waiting = manager.lease("tts", keep_warm=0)
    waiting.cancel()
    with pytest.raises(Exception, match="cancelled"):
        waiting.__enter__()
    assert tts(manager)["keep_warm_s"] == 300


@pytest.mark.parametrize("bad", ["soon", "1d", "", math.nan, True, "100001h"])
def test_what_is_no_time_is_refused_before_anything_is_asked(bad: Any, manager: GPUResourceManager) -> None:
    with pytest.raises(InvalidInput, match=r"-1"):
        manager.lease("tts", keep_warm=bad)
    assert tts(manager)["state"] == "released"


def test_coroutines_say_it_too(manager: GPUResourceManager) -> None:
    async def request() -> None:
        async with manager.lease("tts", keep_warm=300):
            assert tts(manager)["keep_warm_s"] == 300, "it is what will count"

    asyncio.run(request())
    assert tts(manager)["next"] == {"to": "cpu", "in_s": 300}


def test_without_a_gpu_the_release_waits(clock: ManualClock, workshop: Workshop) -> None:
    with GPUResourceManager(CpuDevice(), clock=clock, adopt=workshop.adopt) as manager:
        manager.register("tts", workshop.load)
        use(manager, keep_warm=3600)
        assert tts(manager)["next"] == {"to": "released", "in_s": 3600}
        use(manager, keep_warm=0)
        assert tts(manager)["next"] == {"to": "released", "in_s": 600}


# -- leases that share a request --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [(60, None, 60), (None, 60, 60), (0, 60, 60), (60, 0, 60), (-1, 60, -1), (60, -1, -1), (0, None, 0), (None, 0, 0),
     (None, None, 10)],
)  # fmt: skip
def test_of_leases_that_share_the_longest_counts(
    outer: Any, inner: Any, expected: float, manager: GPUResourceManager
) -> None:
    manager.configure("tts", keep_warm=10)
    with manager.lease("tts", keep_warm=outer):
        version = manager.version
        use(manager, keep_warm=inner)
        assert tts(manager)["keep_warm_s"] == expected
        assert (manager.version != version) == (inner is not None)
    assert tts(manager)["keep_warm_s"] == expected


def test_who_only_reads_under_anothers_request_says_nothing(manager: GPUResourceManager) -> None:
    manager.configure("tts", keep_warm=10)
    client = Client(manager).comes_in()
    use(manager, reading=True, keep_warm=3600)
    assert tts(manager)["keep_warm_s"] == 10
    client.leaves()
    use(manager, reading=True, keep_warm=3600)
    assert tts(manager)["keep_warm_s"] == 3600, "a request of its own"


# -- other models -----------------------------------------------------------------------------------------------


@pytest.fixture
def two(clock: ManualClock) -> Any:
    """A device with room for one of two models."""
    models = {name: Workshop() for name in ("tts", "asr")}
    with GPUResourceManager(SimulatedDevice(1 << 30), clock=clock, adopt=Workshop.adopt, budget_bytes=150) as manager:
        for name, workshop in models.items():
            manager.register(name, workshop.load, size_bytes=100)
        yield manager


def test_others_that_need_the_room_get_it_even_with_minus_1(two: GPUResourceManager, clock: ManualClock) -> None:
    use(two, keep_warm=-1)
    use(two, "asr", keep_warm=-1)
    assert [model["state"] for model in two.status()["models"].values()] == ["cpu", "gpu"]
    clock.advance(1e6)
    use(two, keep_warm="30s")
    assert [model["state"] for model in two.status()["models"].values()] == ["gpu", "cpu"]
    assert two.status()["models"]["asr"]["next"] == {"to": "released", "in_s": 600}
    clock.advance(600)
    assert comes_to(two, clock, State.RELEASED, "asr"), "it left: no longer a reason to stay"


def test_a_model_that_the_operator_keeps_does_not_yield_because_a_request_says_the_same(
    two: GPUResourceManager, clock: ManualClock
) -> None:
    two.configure("tts", keep_warm=-1)
    use(two, keep_warm=-1)
    with pytest.raises(Exception, match="budget"):
        use(two, "asr")
    use(two, keep_warm="5m")
    use(two, "asr", keep_warm="5m")
    assert [model["state"] for model in two.status()["models"].values()] == ["cpu", "gpu"]


def test_make_room_sends_it_away(two: GPUResourceManager) -> None:
    use(two, keep_warm=-1)
    two.make_room("asr")
    assert tts(two)["state"] == "cpu"


# -- policies that learn ----------------------------------------------------------------------------------------


def test_a_policy_learns_the_same_whatever_requests_say(clock: ManualClock) -> None:
    learned = []
    for keep_warm in (None, 0, 40, -1):
        workshop, policy = Workshop(), AdaptivePolicy(600)
        gaps: list[float] = []
        learn = policy.idle_ended
        policy.idle_ended = lambda gap, learn=learn, gaps=gaps: (gaps.append(gap), learn(gap))  # type: ignore[method-assign]
        with GPUResourceManager(SimulatedDevice(1 << 30), clock=clock, adopt=workshop.adopt) as manager:
            manager.register("tts", workshop.load, policy=policy)
            for _ in range(3):
                use(manager, keep_warm=keep_warm)
                clock.advance(50)
                comes_to(manager, clock, State.DEVICE if keep_warm == -1 else State.HOST)
            use(manager)
        learned.append(gaps)
    assert learned == [[50, 50, 50]] * 4


def test_after_a_request_that_says_it_no_window_of_the_policy_brings_the_model_back(clock: ManualClock) -> None:
    class Periodic(AdaptivePolicy):
        def windows(self) -> tuple[tuple[float, float], ...]:
            return ((0.0, 5.0), (40.0, 60.0))

    workshop = Workshop()
    with GPUResourceManager(SimulatedDevice(1 << 30), clock=clock, adopt=workshop.adopt) as manager:
        manager.register("tts", workshop.load, policy=Periodic(600))
        use(manager, keep_warm=10)
        stays_until(manager, clock, 10)
        assert tts(manager)["next"] == {"to": "released", "in_s": 590}
        use(manager)
        clock.advance(5)
        assert comes_to(manager, clock, State.HOST)
        assert tts(manager)["next"] == {"to": "gpu", "in_s": 35}


def test_an_offload_that_fails_is_tried_again(manager: GPUResourceManager, clock: ManualClock, workshop: Any) -> None:
    manager.configure("tts", keep_warm=-1)
    use(manager)
    resident: FakeResident = workshop.resident
    resident.fail_next["offload"] = OSError("not now")
    use(manager, keep_warm=0)
    assert comes_to(manager, clock, State.DEVICE)
    assert tts(manager)["next"] == {"to": "cpu", "in_s": 30}
    clock.advance(30)
    assert comes_to(manager, clock, State.HOST)
