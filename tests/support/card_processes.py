"""Child processes that use a simulated card of the test. Imports no torch, so that they start quickly."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from residency.devices import SimulatedDevice
from residency.errors import DeviceOutOfMemory


class CardProcess:
    """A process to which the device was pickled. It is killed at the end of the block."""

    def __init__(self, device: SimulatedDevice, start: str = "fork") -> None:
        context = multiprocessing.get_context(start)
        self._pipe, theirs = context.Pipe()
        self._device = device  # kept until the process has unpickled it
        self._process = context.Process(target=_serve, args=(pickle.dumps(device), theirs), daemon=True)
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def __enter__(self) -> CardProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def begin(self, expression: str) -> None:
        """Evaluates an expression of ``device`` there."""
        self._pipe.send(expression)

    def result(self) -> Any:
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def ask(self, expression: str) -> Any:
        self.begin(expression)
        return self.result()

    def answers_within(self, seconds: float) -> bool:
        return self._pipe.poll(seconds)

    def kill(self) -> None:
        """Kills it and leaves a zombie."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)


def _serve(pickled: bytes, pipe: Connection) -> None:
    device = pickle.loads(pickled)
    names = {"device": device, "charge_and_refund": charge_and_refund, "hold": hold, "pipe": pipe}
    while True:
        expression = pipe.recv()
        try:
            pipe.send(eval(expression, names))
        except Exception as error:
            pipe.send(error)


def charge_and_refund(device: SimulatedDevice, times: int) -> tuple[int, int]:
    """Tries to charge the whole card; returns how often it could, and how often the card held more than its size."""
    taken = exceeded = 0
    for _ in range(times):
        try:
            device.charge(device.capacity_bytes)
        except DeviceOutOfMemory:
            continue
        taken += 1
        exceeded += device.ledger_bytes > device.capacity_bytes
        device.refund(device.capacity_bytes)
    return taken, exceeded


def hold(device: SimulatedDevice, pipe: Connection) -> None:
    """Keeps the lock of the card from all others, until this process is killed."""

    def wait(_: object) -> None:
        pipe.send("held")
        signal.pause()

    device.ledger.locked(wait)
