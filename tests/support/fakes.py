"""Engines and residents under a test's control."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from gpu_manager import GPUResourceManager
from residency.clock import ManualClock, SystemClock
from residency.contracts import Device
from residency.scheduling.managed_model import ManagedModel
from residency.states import State


class Gate:
    """Stops a thread until the test opens it; the test can wait for the thread's arrival."""

    def __init__(self) -> None:
        self._arrived = threading.Event()
        self._open = threading.Event()

    def pass_through(self) -> None:
        self._arrived.set()
        assert self._open.wait(60), "the test never opened the gate"

    def wait_for_arrival(self) -> None:
        assert self._arrived.wait(60), "nobody came to the gate"

    def open(self) -> None:
        self._open.set()

    @property
    def arrived(self) -> bool:
        return self._arrived.is_set()


class FakeResident:
    """A resident of ``nbytes`` that logs its moves and fails on request."""

    def __init__(self, nbytes: int = 100) -> None:
        self.nbytes = nbytes
        self.place = "device"
        self.log: list[str] = []
        self.fail_next: dict[str, BaseException] = {}
        self.gates: dict[str, Gate] = {}

    @property
    def device_bytes(self) -> int:
        return self.nbytes if self.place == "device" else 0

    @property
    def host_bytes(self) -> int:
        return self.nbytes if self.place == "host" else 0

    def _move(self, verb: str, place: str) -> int:
        self.log.append(verb)
        if verb in self.gates:
            self.gates.pop(verb).pass_through()
        if verb in self.fail_next:
            raise self.fail_next.pop(verb)
        self.place = place
        return self.nbytes

    def offload(self) -> int:
        return self._move("offload", "host")

    def restore(self) -> int:
        return self._move("restore", "device")

    def release(self) -> int:
        return self._move("release", "nowhere")

    def save(self, store: Any, name: str) -> int:
        return self._move("save", "disk")

    def load(self, store: Any, name: str) -> int:
        return self._move("load", "host")


class FakeEngine:
    def __init__(self, resident: FakeResident) -> None:
        self.resident = resident


class Workshop:
    """A loader and the matching ``adopt``: counts loads, stops them at a gate, and makes them fail."""

    def __init__(self, nbytes: int = 100) -> None:
        self.nbytes = nbytes
        self.loads = 0
        self.fail_next: BaseException | None = None
        self.gate: Gate | None = None
        self.engines: list[FakeEngine] = []

    def load(self) -> FakeEngine:
        self.loads += 1
        if self.gate:
            gate, self.gate = self.gate, None
            gate.pass_through()
        if self.fail_next:
            error, self.fail_next = self.fail_next, None
            raise error
        self.engines.append(FakeEngine(FakeResident(self.nbytes)))
        return self.engines[-1]

    @property
    def resident(self) -> FakeResident:
        """The resident of the latest engine."""
        return self.engines[-1].resident

    @staticmethod
    def adopt(engine: Any, device: Device, managed: ManagedModel) -> FakeResident:
        resident = engine.resident
        assert isinstance(resident, FakeResident)
        return resident


class Worker(threading.Thread):
    """A thread that stores its function's result or error; `result` waits for it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        super().__init__(daemon=True)
        self._function, self._arguments = function, arguments
        self._value: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._function(*self._arguments)
        except BaseException as error:
            self.error = error

    def result(self) -> Any:
        self.join(60)
        assert not self.is_alive(), "the thread is still waiting"
        if self.error:
            raise self.error
        return self._value


_OF_THE_RUN = "gpu-worker-server"
"""Thread of the fork server that tests of a run share."""


def running(*names: str) -> list[threading.Thread]:
    """Returns running threads by prefix of name, without those whose start was interrupted."""
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith(names) and thread.is_alive() and thread.name != _OF_THE_RUN
    ]


class Client:
    """A request in a separate thread that holds its lease until `leave`."""

    def __init__(self, manager: GPUResourceManager, name: str = "tts", timeout: float | None = None) -> None:
        self.manager, self.managed = manager, manager._managed_models[name]
        self.lease = manager.lease(name, timeout)
        self._inside = Gate()
        self.worker = Worker(self._request)

    def _request(self) -> Any:
        with self.lease as engine:
            self._inside.pass_through()
            return engine

    def comes_in(self) -> Client:
        """Waits until the request has its lease."""
        self._inside.wait_for_arrival()
        return self

    def queues(self) -> Client:
        """Waits until the request waits in the queue."""

        def waits() -> bool:
            request = self.lease.request
            return request is not None and request.event is not None and request in self.managed.leases.waiting()

        assert await_that(self.manager, self.managed, waits), "it does not wait"
        return self

    def leaves(self) -> Any:
        self._inside.open()
        return self.worker.result()


def after(clock: ManualClock, seconds: float, worker: Worker) -> Any:
    """Advances the clock; returns or raises the thread's result."""
    clock.advance(seconds)
    while worker.is_alive():
        worker.join(0.01)
        clock.advance(0)  # the thread may read the clock only now
    return worker.result()


def comes_to(manager: GPUResourceManager, clock: ManualClock, state: State, name: str = "tts") -> bool:
    """Returns whether a model soon reaches a state without a change of the clock."""
    return any(manager.wait_for(name, state, 0.01) or clock.advance(0) for _ in range(6000))


def await_that(manager: GPUResourceManager, managed: ManagedModel, comes_true: Callable[[], bool]) -> bool:
    """Waits until a condition on a model's state is true; returns False on timeout."""
    return manager._dispatcher.watch(managed, comes_true, 60, SystemClock())
