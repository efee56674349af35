"""Keeps the states of real processes in files of the folder ``FAKE_CHECKPOINTS``, and fails on demand.

``PID.state``: the state. ``CALL.order``: a JSON object, what the next call of that name does instead, in this order:
``work`` (as without an order), ``state`` (sets it), ``kill`` (the process), ``hang`` (for ever), ``die`` (kills this
process), ``error`` (the text). ``log`` has a line for the begin and the end of each call. If there is a file ``card``,
the pickle of a simulated card, the states are those of its books.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["FAKE_CHECKPOINTS"])
#: Steps on the simulated card, if there is one.
CARD: Any = None
if (FOLDER / "card").exists():
    from residency.devices.simulated_checkpoints import SimulatedCheckpoints

    CARD = SimulatedCheckpoints(pickle.loads((FOLDER / "card").read_bytes()))
#: The state in which a call is allowed, and the one afterwards.
MOVES = {
    "lock": ("running", "locked"),
    "checkpoint": ("locked", "checkpointed"),
    "restore": ("checkpointed", "locked"),
    "unlock": ("locked", "running"),
}


class CUDAError(Exception): ...


def _log(line: str) -> None:
    with (FOLDER / "log").open("a") as log:
        log.write(f"{line}\n")


def obey(call: str, pid: int, work: Callable[[], None]) -> None:
    """Logs a call, and does its work, or what its order says."""
    _log(f"{os.getpid()} {call} {pid}")
    try:
        file = FOLDER / f"{call}.order"
        order = json.loads(file.read_text()) if file.exists() else {"work": True}
        file.unlink(missing_ok=True)
        if order.get("work"):
            work()
        if "state" in order:
            _state_file(pid).write_text(order["state"])
        if order.get("kill"):
            handle = os.pidfd_open(pid)
            os.kill(pid, signal.SIGKILL)
            select.select([handle], [], [])
        if order.get("hang"):
            (FOLDER / "hangs").open("w").close()  # a FIFO: waits for the test
            threading.Event().wait()
        if order.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if "error" in order:
            raise CUDAError(order["error"])
    finally:
        _log(f"{os.getpid()} end of {call} {pid}")


def _state_file(pid: int) -> Path:
    return FOLDER / f"{pid}.state"


class Process:
    def __init__(self, pid: int) -> None:
        self._pid = pid

    @property
    def state(self) -> str:
        obey("state", self._pid, lambda: os.kill(self._pid, 0))
        return self._state()

    def _state(self) -> str:
        if CARD is not None:
            found: str = CARD.state(self._pid)
            return found
        file = _state_file(self._pid)
        return file.read_text() if file.exists() else "running"

    def _move(self, call: str) -> None:
        obey(call, self._pid, (lambda: self._on_card(call)) if CARD is not None else lambda: self._work(*MOVES[call]))

    def _on_card(self, call: str) -> None:
        try:
            CARD.make(call, self._pid, 60)
        except Exception as error:
            full = "CUDA_ERROR_OUT_OF_MEMORY" if error.__cause__ else "CUDA_ERROR_ILLEGAL_STATE"
            raise CUDAError(f"{full}: {error.args[-1]}") from error

    def _work(self, before: str, after: str) -> None:
        if self._state() != before:
            raise CUDAError("CUDA_ERROR_ILLEGAL_STATE: not in a valid state")
        _state_file(self._pid).write_text(after)

    def lock(self, timeout_ms: int = 0) -> None:
        (FOLDER / "timeout_ms").write_text(str(timeout_ms))
        self._move("lock")

    def checkpoint(self) -> None:
        self._move("checkpoint")

    def restore(self) -> None:
        self._move("restore")

    def unlock(self) -> None:
        self._move("unlock")
