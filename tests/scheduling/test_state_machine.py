"""Random lives of two models, held against a reference that is simple enough to be right.

The reference knows no threads: after every rule the world is given time to come to rest, and must then be exactly where
the reference says. ``HYPOTHESIS_PROFILE=nightly`` walks more than 100,000 steps.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import pytest
from fakes import Gate, Worker, Workshop, await_that
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from gpu_manager import GPUResourceManager, RequestCancelled, RequestTimeout, SimulatedDevice
from residency.clock import ManualClock
from residency.scheduling.dispatcher import RETRY_AFTER_S, WARM_GRACE_S
from residency.scheduling.planner import next_step

pytestmark = pytest.mark.usefixtures("unmeasured")

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
NAMES = st.sampled_from(["tts", "asr"])
TIMES = st.sampled_from([0.0, 5.0, 30.0, 90.0, 400.0, 700.0])
OWN_TIMES = st.sampled_from([None, None, None, 0.0, 60.0, 1000.0, math.inf])


class Client:
    """A request in a thread of its own, which stays until it is told to leave."""

    def __init__(
        self, manager: GPUResourceManager, name: str, timeout: float | None, keep_warm: float | None = None
    ) -> None:
        self.lease, self.keep_warm_s = manager.lease(name, timeout, keep_warm=keep_warm), keep_warm
        self.gives_up_s = math.inf if timeout is None else manager._dispatcher.clock.now() + timeout
        self.inside = Gate()
        self.discards = False
        self.worker = Worker(self._request)

    def _request(self) -> Any:
        with self.lease as engine:
            self.inside.pass_through()
            if self.discards:
                self.lease.discard()
            return engine


@dataclass
class Reference:
    """What a model should be like. ``line`` are its requests; the first one holds it.

    ``own_s``: how long the last one that held it wanted it to stay; ``left_after_s``: when it left before that.
    """

    place: str = "released"
    keep_warm_s: float = 0.0
    own_s: float | None = None
    left_after_s: float = 0.0
    idle_timeout_s: float = 600.0
    idle_since_s: float | None = None
    paused_until_s: float = -math.inf
    asked: str | None = None
    warmed: bool = False
    broken: bool = False
    loads: int = 0
    armed: set[str] = field(default_factory=set)
    line: list[Client] = field(default_factory=list)

    def move(self, place: str) -> str | None:
        """Move there, or say what went wrong."""
        verb = {("released", "device"): "load", ("host", "device"): "restore", ("device", "host"): "offload"}.get(
            (self.place, place)
        )
        if verb in self.armed:
            self.armed.remove(verb)
            return verb
        if "released" in (self.place, place):
            self.armed -= {"restore", "offload"}  # they were the old engine's
            self.broken = False
        self.loads += verb == "load"
        self.place = place
        return None

    def arrive(self, now_s: float) -> str | None:
        """Somebody calls for it; what went wrong, if anything."""
        if self.broken:
            self.move("released")
        if self.place == "device":
            return None
        came_from = self.place
        if wrong := self.move("device"):
            self.paused_until_s = now_s + RETRY_AFTER_S
            self.broken = wrong == "restore"
            return wrong
        if came_from == "released":
            self.idle_since_s = now_s
        self.paused_until_s, self.own_s = -math.inf, None
        return None

    def go_down(self, place: str, now_s: float) -> str | None:
        if self.place == "released" or self.place == place:
            return None
        wrong, idle_s = self.move(place), now_s - (now_s if self.idle_since_s is None else self.idle_since_s)
        self.left_after_s = idle_s if not wrong and idle_s < (self.own_s or 0) else 0.0
        if wrong:
            self.paused_until_s = now_s + RETRY_AFTER_S
        return wrong

    def settle(self, now_s: float) -> None:
        """Nobody wants it: what was asked for happens, then what its times say."""
        if self.line:
            return
        if self.asked:
            asked, self.asked = self.asked, None
            self.go_down(asked, now_s)
        if self.broken and self.place == "device":
            self.move("released")
        if self.idle_since_s is None or now_s < self.paused_until_s:
            return
        warm_s = self.keep_warm_s if self.own_s is None else self.own_s
        early = self.own_s is not None and self.place == "host"
        until_s = self.left_after_s + self.idle_timeout_s if early else warm_s
        if now_s >= self.idle_since_s + max(self.idle_timeout_s, until_s):
            self.go_down("released", now_s)
        elif self.place == "device" and now_s >= self.idle_since_s + warm_s:
            self.go_down("host", now_s)


class Lives(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.shops = {"tts": Workshop(), "asr": Workshop()}
        self.references = {"tts": Reference(), "asr": Reference()}
        self.manager = GPUResourceManager(SimulatedDevice(1000), clock=self.clock, adopt=Workshop.adopt)
        for name, shop in self.shops.items():
            self.manager.register(name, shop.load)

    # -- rules --------------------------------------------------------------------------------------------------

    @rule(name=NAMES, timeout=st.sampled_from([None, None, 20.0, 100.0]), keep_warm=OWN_TIMES)
    def request(self, name: str, timeout: float | None, keep_warm: float | None) -> None:
        reference, managed = self.references[name], self.manager._managed_models[name]
        client = Client(self.manager, name, timeout, keep_warm)
        if reference.line:
            reference.line.append(client)
            assert await_that(
                self.manager, managed, lambda: sum(1 for _ in managed.leases.waiting()) == len(reference.line) - 1
            )
        elif wrong := reference.arrive(self.clock.now()):
            with pytest.raises(OSError, match=wrong):
                client.worker.result()
        else:
            reference.line.append(client)
            reference.own_s = keep_warm
            client.inside.wait_for_arrival()
        self.come_to_rest()

    @rule(name=NAMES, discards=st.sampled_from([False, False, False, True]))
    def leave(self, name: str, discards: bool) -> None:
        reference, now_s = self.references[name], self.clock.now()
        if not reference.line:
            return
        client = reference.line.pop(0)
        client.discards = discards
        client.inside.open()
        assert client.worker.result() is self.shops[name].engines[reference.loads - 1]
        reference.broken |= discards
        reference.idle_since_s, reference.paused_until_s = now_s, -math.inf
        if reference.line:
            asked, reference.asked = reference.asked, None
            if asked:
                reference.go_down(asked, now_s)
            wrong = reference.arrive(now_s)
            if not wrong:
                reference.own_s = reference.line[0].keep_warm_s
                reference.line[0].inside.wait_for_arrival()
            for refused in reference.line if wrong else []:
                with pytest.raises(OSError, match=wrong):
                    refused.worker.result()
            reference.line = [] if wrong else reference.line
            reference.warmed &= not wrong
        elif reference.warmed:
            reference.warmed = False
            if not reference.arrive(now_s):
                reference.idle_since_s, reference.paused_until_s = now_s, now_s + WARM_GRACE_S
        self.come_to_rest()

    @rule(name=NAMES, data=st.data())
    def cancel(self, name: str, data: st.DataObject) -> None:
        line = self.references[name].line
        if not line:
            return
        client = data.draw(st.sampled_from(line))
        waits = client is not line[0]
        assert client.lease.cancel() is waits
        if waits:
            line.remove(client)
            with pytest.raises(RequestCancelled):
                client.worker.result()
        self.come_to_rest()

    @rule(seconds=st.sampled_from([1.0, 4.0, 26.0, 61.0, 500.0, 1000.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        for reference in self.references.values():
            for client in reference.line[1:]:
                if self.clock.now() >= client.gives_up_s:
                    reference.line.remove(client)
                    with pytest.raises(RequestTimeout):
                        client.worker.result()
        self.come_to_rest()

    @rule(name=NAMES, place=st.sampled_from(["host", "released"]))
    def by_hand(self, name: str, place: str) -> None:
        reference = self.references[name]
        press = self.manager.offload if place == "host" else self.manager.release
        if reference.line:
            assert press(name) is False
            reference.asked = place if reference.asked != "released" else "released"
            reference.warmed = False
            self.come_to_rest()
            return
        reference.paused_until_s = -math.inf
        if wrong := reference.go_down(place, self.clock.now()):
            with pytest.raises(OSError, match=wrong):
                press(name)
        else:
            assert press(name) is True
        self.come_to_rest()

    @rule(name=NAMES)
    def warm(self, name: str) -> None:
        reference, now_s = self.references[name], self.clock.now()
        there = reference.place == "device"
        assert self.manager.warm(name) is there
        if reference.line:
            reference.asked, reference.warmed = None, True
        elif there:
            reference.paused_until_s = max(reference.paused_until_s, now_s + WARM_GRACE_S)
        elif not reference.arrive(now_s):
            reference.idle_since_s, reference.paused_until_s = now_s, now_s + WARM_GRACE_S
        self.come_to_rest()

    @rule(name=NAMES, keep_warm=TIMES, idle_timeout=TIMES)
    def configure(self, name: str, keep_warm: float, idle_timeout: float) -> None:
        reference = self.references[name]
        self.manager.configure(name, keep_warm=keep_warm, idle_timeout=idle_timeout)
        reference.keep_warm_s, reference.idle_timeout_s, reference.own_s = keep_warm, idle_timeout, None
        self.come_to_rest()

    @rule(name=NAMES)
    def goes_and_comes_anew(self, name: str) -> None:
        """Unregistered and registered again, it remembers nothing."""
        if self.references[name].line:
            return
        self.manager.unregister(name)
        assert all(engine.resident.place == "nowhere" for engine in self.shops[name].engines)
        self.shops[name], self.references[name] = Workshop(), Reference()
        self.manager.register(name, self.shops[name].load)
        self.come_to_rest()

    @rule(name=NAMES, verb=st.sampled_from(["load", "restore", "offload"]))
    def something_will_fail(self, name: str, verb: str) -> None:
        reference, shop = self.references[name], self.shops[name]
        if verb == "load":
            shop.fail_next = OSError("load")
        elif reference.place == "released":
            return
        else:
            shop.resident.fail_next[verb] = OSError(verb)
        reference.armed.add(verb)

    # -- and what must hold after each --------------------------------------------------------------------------

    def come_to_rest(self) -> None:
        now_s = self.clock.now()
        for name, reference in self.references.items():
            managed = self.manager._managed_models[name]
            assert await_that(
                self.manager,
                managed,
                lambda managed=managed: managed.move_task is None and next_step(managed, now_s, True) is None,
            ), f"{name} does not come to rest"
            reference.settle(now_s)
            status = self.manager.status()["models"][name]
            shown = {"gpu": "device", "cpu": "host", "released": "released"}[status["state"]]
            assert (name, shown) == (name, reference.place)
            assert len(self.shops[name].engines) == reference.loads
            warm_s = reference.keep_warm_s if reference.own_s is None else reference.own_s
            assert status["keep_warm_s"] == (-1 if warm_s == math.inf else warm_s)
            assert status["leases"] + status["waiting"] == len(reference.line)
            assert status["pending"] == {None: None, "host": "offload", "released": "release"}[reference.asked]
            assert managed.faults.broken is reference.broken
            if reference.loads:
                place = {"released": "nowhere"}.get(reference.place, reference.place)
                assert self.shops[name].resident.place == place
            for place, client in enumerate(reference.line):
                assert client.lease.place == place

    def teardown(self) -> None:
        for reference in self.references.values():
            for client in reference.line:
                client.inside.open()
        assert Worker(self.manager.close).result() is True
        for shop in self.shops.values():
            assert all(engine.resident.place == "nowhere" for engine in shop.engines)


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=2_500 if NIGHTLY else 75,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
