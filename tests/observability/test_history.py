from __future__ import annotations

import itertools
from contextlib import suppress
from typing import Any

import pytest
import torch
from fakes import Client, FakeResident, Gate, Worker, Workshop, after

from gpu_manager import CpuDevice, GPUResourceManager, LoadTimeout, ModelBusy, RequestTimeout, SimulatedDevice
from residency.clock import ManualClock, SystemClock
from residency.contracts import Memory
from residency.observability.history import (
    RECENT_MOVES,
    WINDOW_S,
    DeviceHistory,
    GivenBack,
    Histogram,
    History,
    PastMove,
)
from residency.states import Move, State

UP, DOWN = Move("tts", State.HOST, State.DEVICE), Move("tts", State.DEVICE, State.HOST)


def past(time_s: float, move: Move = UP, outcome: str = "ok") -> PastMove:
    return PastMove(time_s, move, 100, 0.5, outcome)


def test_a_histogram_counts_up_to_each_bound() -> None:
    histogram = Histogram()
    for seconds in (0, 0.001, 0.3, 1e9):
        histogram.add(seconds)
    shown = histogram.as_dict()
    buckets = dict(shown["buckets"])
    assert (buckets["0.001"], buckets["0.25"], buckets["0.5"], buckets["300.0"], buckets["+Inf"]) == (2, 2, 3, 3, 4)
    assert shown["sum"] == 1e9 + 0.301


class TestWindow:
    def test_what_is_older_is_forgotten_but_for_the_size_that_it_begins_with(self) -> None:
        history = History()
        for time_s, nbytes in ((0, 100), (10, 0), (5000, 70)):
            history.moved(past(time_s), nbytes)
        history.served(0, 1, 2, None)
        history.served(0, 4000, 5000, None)
        shown = history.as_dict(5100, "cuda")
        assert shown["device_bytes"] == [[WINDOW_S, 0], [100, 70]]
        assert shown["requests"] == [[WINDOW_S, 100]]

    def test_a_running_request_is_one_of_them(self) -> None:
        assert History().as_dict(50, "cuda", running_since_s=20)["requests"] == [[30, 0]]

    def test_a_busy_model_has_no_longer_a_past_than_an_idle_one(self) -> None:
        history = History()
        for tick in range(20_000):
            time_s = tick / 10
            history.moved(past(time_s), 100 if tick % 2 else 0)
            history.served(time_s, time_s, time_s + 0.05, None)
        shown = history.as_dict(2000, "cuda")
        assert len(shown["device_bytes"]) <= 2 * WINDOW_S + 2
        assert len(shown["requests"]) == 1
        assert len(shown["moves"]) == RECENT_MOVES

    @pytest.mark.parametrize("steps", [1, 3, 7])
    def test_no_peak_and_no_end_is_lost_when_much_happens_at_once(self, steps: int) -> None:
        history = History()
        history.moved(past(0), 5)
        for tick in range(steps):
            history.moved(past(10 + tick / 100), 900 if tick == 0 else 7)
        shown = [nbytes for _, nbytes in history.as_dict(20, "cuda")["device_bytes"]]
        assert max(shown) == 900
        assert shown[-1] == (900 if steps == 1 else 7)


class TestGivenBack:
    """Bytes times hours that a model did not use on the device."""

    def test_each_size_counts_until_the_next(self) -> None:
        given_back = GivenBack()
        assert given_back.byte_hours(1e9) == 0
        given_back.note(3600, 100)
        given_back.note(3600 + 1800, 30)
        given_back.note(7200, -5)
        assert given_back.byte_hours(7200) == given_back.byte_hours(1e9) == 65

    def test_a_manager_counts_from_the_first_load_while_the_model_is_elsewhere(
        self, clock: ManualClock, workshop: Workshop
    ) -> None:
        with GPUResourceManager(SimulatedDevice(1 << 30), clock=clock, adopt=workshop.adopt) as manager:
            manager.register("tts", workshop.load, keep_warm=1800, size_bytes=100)

            def hours() -> float | None:
                return manager.history()["models"]["tts"]["totals"]["given_back_byte_hours"]

            clock.advance(3600)
            workshop.fail_next = OSError("no weights")
            with suppress(OSError), manager.lease("tts"):
                pass
            clock.advance(3600)
            assert hours() == 0, "it has never been there"
            with manager.lease("tts"):
                clock.advance(3600)
            clock.advance(900)
            assert hours() == 0, "it is there"
            manager.offload("tts")
            clock.advance(360)
            assert hours() == 10
            workshop.resident.gates["restore"] = gate = Gate()
            manager.warm("tts")
            gate.wait_for_arrival()
            clock.advance(3600)
            assert hours() == 10, "what arrives takes its memory already"
            gate.open()
            assert manager.wait_for("tts", State.DEVICE)
            manager.release("tts")
            clock.advance(360)
            assert hours() == 20
            workshop.fail_next = OSError("no weights")
            with suppress(OSError), manager.lease("tts"):
                pass
            clock.advance(360)
            assert hours() == 30

    def test_what_an_offload_leaves_there_is_not_given_back(self, clock: ManualClock, workshop: Workshop) -> None:
        class Partly(FakeResident):
            @property
            def device_bytes(self) -> int:
                return 100 if self.place == "device" else 25

        with GPUResourceManager(
            SimulatedDevice(1 << 30), clock=clock, adopt=lambda engine, device, managed: Partly()
        ) as manager:
            manager.register("tts", workshop.load)
            with manager.lease("tts"):
                pass
            clock.advance(3600)
            assert manager.history()["models"]["tts"]["totals"]["given_back_byte_hours"] == 75

    def test_a_cpu_gets_nothing_back(self, clock: ManualClock, workshop: Workshop) -> None:
        with GPUResourceManager(CpuDevice(), clock=clock, adopt=workshop.adopt) as manager:
            manager.register("tts", workshop.load)
            with manager.lease("tts"):
                pass
            manager.release("tts")
            clock.advance(3600)
            assert manager.history()["models"]["tts"]["totals"]["given_back_byte_hours"] is None


class TestCard:
    """What everybody together uses of the card, as far as somebody looked."""

    def test_it_is_written_by_who_looks_and_by_moves(self, manager: GPUResourceManager, clock: ManualClock) -> None:
        device: Any = manager.device
        clock.advance(1)
        manager.status()
        device.charge(300)  # somebody else
        clock.advance(20)
        assert manager.history()["device"] == {"used_bytes": [[20, 0]], "total_bytes": 1 << 30}
        manager.warm("tts")
        assert manager.wait_for("tts", State.DEVICE)
        clock.advance(10)
        assert manager.history()["device"]["used_bytes"] == [[30, 0], [10, 300]]
        device.refund(300)

    def test_nobody_makes_it_long(self) -> None:
        card = DeviceHistory()
        for tick in range(20_000):
            card.note(tick / 10, Memory(1000, tick % 7))
        assert len(card.as_dict(2000)["used_bytes"]) <= 2 * WINDOW_S / 5 + 2

    def test_what_stays_is_one_point_and_what_is_unknown_is_none(self) -> None:
        card = DeviceHistory()
        for time_s in range(100):
            card.note(time_s, Memory(1000, 400))
            card.note(time_s, Memory())
        assert card.as_dict(100) == {"used_bytes": [[100, 600]], "total_bytes": 1000}


class TestManager:
    """What the manager writes down."""

    def outcomes(self, manager: GPUResourceManager) -> Any:
        return manager.history()["models"]["tts"]["totals"]["requests"]

    def test_requests_are_counted_by_how_they_ended(self, manager: GPUResourceManager) -> None:
        with pytest.raises(RuntimeError), manager.lease("tts"):
            raise RuntimeError("the engine's")
        with manager.lease("tts"), suppress(RuntimeError), manager.lease("tts"):
            raise RuntimeError("caught, and done again")
        assert self.outcomes(manager) == {"error": 1, "ok": 1}

    def test_moves_are_told_as_they_ended(
        self, manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
    ) -> None:
        manager.configure(keep_warm=0)
        workshop.fail_next = OSError("no weights")
        for _ in range(2):
            with suppress(OSError), manager.lease("tts"):
                clock.advance(5)
        moves = manager.history()["models"]["tts"]["moves"]
        said = [(past["from"], past["to"], past["outcome"], past["bytes"]) for past in moves]
        assert sorted(said) == [
            ("gpu", "cpu", "ok", 100),
            ("released", "gpu", "failed", 0),
            ("released", "gpu", "ok", 100),
        ]
        assert all(past["seconds"] == 0 for past in moves), "the clock stood still meanwhile"

    def test_where_the_device_is_a_cpu_it_is_its_memory_that_is_shown(self) -> None:
        with GPUResourceManager(CpuDevice()) as manager:
            manager.register("tts", lambda: torch.nn.Linear(10, 10))
            with manager.lease("tts"):
                pass
            assert manager.history()["models"]["tts"]["device_bytes"][-1][1] == 440
            manager.release()
            assert manager.history()["models"]["tts"]["device_bytes"][-1][1] == 0

    def test_a_load_that_was_given_up_has_failed(
        self, manager: GPUResourceManager, clock: ManualClock, workshop: Workshop
    ) -> None:
        manager.register("slow", workshop.load, load_timeout=10)
        gate = workshop.gate = Gate()
        client = Client(manager, "slow").queues()
        gate.wait_for_arrival()
        with pytest.raises(LoadTimeout):
            after(clock, 10, client.worker)
        assert [(past["outcome"], past["seconds"]) for past in manager.history()["models"]["slow"]["moves"]] == [
            ("failed", 10)
        ]
        gate.open()

    def test_a_nested_lease_is_no_request(self, manager: GPUResourceManager) -> None:
        with manager.lease("tts"), manager.lease("tts"):
            pass
        assert self.outcomes(manager) == {"ok": 1}

    def test_one_that_was_refused_is_counted_once(self, manager: GPUResourceManager, workshop: Workshop) -> None:
        with pytest.raises(ModelBusy), manager.lease("tts", timeout=0):
            pass
        workshop.fail_next = OSError("no weights")
        with pytest.raises(OSError, match="no weights"), manager.lease("tts"):
            pass
        assert self.outcomes(manager) == {"busy": 1, "failed": 1}
        assert [move["outcome"] for move in manager.history()["models"]["tts"]["moves"]] == ["failed"]

    def test_waiting_is_measured(self, manager: GPUResourceManager, workshop: Workshop, clock: ManualClock) -> None:
        workshop.gate = gate = Gate()

        def use() -> None:
            with manager.lease("tts"):
                pass

        worker = Worker(use)
        gate.wait_for_arrival()
        clock.advance(7)
        gate.open()
        worker.result()
        totals = manager.history()["models"]["tts"]["totals"]
        assert totals["request_wait_seconds"]["sum"] == 7
        assert totals["move_seconds"]["sum"] == pytest.approx(7)

    def test_a_timeout_is_one(self, manager: GPUResourceManager, workshop: Workshop, clock: ManualClock) -> None:
        workshop.gate = gate = Gate()

        def use() -> None:
            with manager.lease("tts", timeout=3):
                pass

        worker = Worker(use)
        gate.wait_for_arrival()
        with pytest.raises(RequestTimeout):
            after(clock, 3, worker)
        gate.open()
        assert self.outcomes(manager) == {"timeout": 1}

    def test_what_it_held_on_the_device_is_remembered(self, manager: GPUResourceManager, clock: ManualClock) -> None:
        with manager.lease("tts"):
            clock.advance(10)
            running = manager.history()["models"]["tts"]
            assert running["requests"] == [[10, 0]]
        clock.advance(5)
        shown = manager.history()["models"]["tts"]
        assert [ago_s for ago_s, _ in shown["device_bytes"]] == [15, 5]
        assert shown["device_bytes"][0][1] > shown["device_bytes"][1][1] == 0
        assert shown["requests"] == [[15, 5]]
        assert [(move["from"], move["to"]) for move in shown["moves"]] == list(
            itertools.pairwise(["released", "gpu", "cpu"])
        )

    def test_a_move_has_taken_one_time_wherever_it_is_told(self) -> None:
        class Ticking(SystemClock):
            ticks = itertools.count()

            def now(self) -> float:
                return next(self.ticks) / 1024

        with GPUResourceManager(SimulatedDevice(1 << 30), clock=Ticking()) as manager:
            manager.register("tts", Workshop().load)
            manager.warm("tts")
            assert manager.wait_for("tts", State.DEVICE)
            told = manager.status()["models"]["tts"]["last_move"]["seconds"]
            past = manager.history()["models"]["tts"]
            assert past["moves"][0]["seconds"] == round(past["totals"]["move_seconds"]["sum"], 6) == told

    def test_the_version_tells_that_there_is_news(self, manager: GPUResourceManager) -> None:
        versions = [manager.version]
        with manager.lease("tts"):
            versions.append(manager.version)
            manager.release("tts")
            versions.append(manager.version)
        versions.append(manager.version)
        manager.configure("tts", keep_warm=5)
        versions.append(manager.version)
        assert len(set(versions)) == 5
        manager.status()
        manager.history()
        assert manager.version == versions[-1]
