"""Checkpoints of processes that use a simulated card. Nothing is copied: the bytes leave the card's books."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from ..contracts import ProcessCheckpoints
from ..errors import CheckpointFailed, DeviceOutOfMemory
from ..sentences import Sentence
from .cpu import SimulatedDevice
from .ledger import CHECKPOINTED, FAILED, LOCKED, RUNNING, Ledger, started_at

Step = Literal["lock", "checkpoint", "restore", "unlock"]
State = Literal["running", "locked", "checkpointed", "failed", "gone"]

_STATES: dict[int | None, State] = {
    RUNNING: "running", LOCKED: "locked", CHECKPOINTED: "checkpointed", FAILED: "failed", None: "gone",
}  # fmt: skip
_CHANGES: dict[Step, tuple[int, int]] = {
    "lock": (RUNNING, LOCKED),
    "checkpoint": (LOCKED, CHECKPOINTED),
    "restore": (CHECKPOINTED, LOCKED),
    "unlock": (LOCKED, RUNNING),
}
_LEFT: dict[State, Sentence] = {
    "running": Sentence("the process runs as before", "进程照常运行"),
    "locked": Sentence("the process is locked and must be ended", "进程处于锁定状态，需要结束"),
    "checkpointed": Sentence("the process is still checkpointed", "进程仍处于检查点状态"),
    "failed": Sentence("the process cannot go on and must be ended", "进程无法继续，需要结束"),
    "gone": Sentence("the process has ended", "进程已结束"),
}


class SimulatedCheckpoints(ProcessCheckpoints):
    """Checkpoints on a simulated card. A checkpointed process runs on, but its calls of the card wait. Thread-safe.

    Each copy takes the time of its bytes at ``bytes_per_s``, which is only given to ``sleep``.

    For tests: ``failure`` has the messages of steps that fail. Such a step changes nothing, unless ``fatal`` has the
    state that it leaves; for ``gone`` the process is killed.
    """

    def __init__(
        self, device: SimulatedDevice, bytes_per_s: float = math.inf, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self.failure: dict[Step, str] = {}
        self.fatal: dict[Step, Literal["failed", "gone"]] = {}
        self._device, self._sleep = device, sleep

    def unavailable(self) -> Sentence | None:
        if hasattr(os, "memfd_create"):
            return None
        return Sentence("processes share a simulated GPU on Linux only", "仅 Linux 支持多个进程共用模拟 GPU")

    def checkpoint(self, pid: int, timeout_s: float) -> None:
        self._run(("lock", "checkpoint"), pid, timeout_s)

    def restore(self, pid: int, timeout_s: float) -> None:
        self._run(("restore", "unlock"), pid, timeout_s)

    def state(self, pid: int) -> State:
        return _STATES[self._device.ledger.locked(Ledger.state_of, pid)]

    def close(self) -> None:
        return

    def _run(self, steps: tuple[Step, Step], pid: int, timeout_s: float) -> None:
        for step in steps:
            try:
                self._do(step, pid, timeout_s)
            except (_StepFailed, DeviceOutOfMemory) as error:
                if step == "checkpoint" and self.state(pid) == "locked":
                    with suppress(_StepFailed):
                        self._do("unlock", pid, timeout_s)
                left = _LEFT[self.state(pid)]
                en, zh = (error.en, error.zh) if isinstance(error, DeviceOutOfMemory) else error.args
                reason = Sentence(f"{en.rstrip('.')}; {left.en}", f"{zh.rstrip('。')}；{left.zh}")
                raise CheckpointFailed(pid, step, reason) from error

    def _do(self, step: Step, pid: int, timeout_s: float) -> None:
        before, after = _CHANGES[step]
        if step in self.failure:
            self._fail(step, pid)
        copies = CHECKPOINTED in (before, after)
        seconds = self._device.ledger.locked(Ledger.bytes_in, pid) / self.bytes_per_s if copies else 0.0
        if seconds > timeout_s:
            self._sleep(timeout_s)
            raise _StepFailed(f"it takes longer than {timeout_s:g} s", f"耗时超过 {timeout_s:g} 秒")
        if step == "restore":  # the bytes are on the card from its begin, and after a checkpoint until its end
            self._change(pid, before, after)
        if seconds:
            self._sleep(seconds)
        if step != "restore":
            self._change(pid, before, after)

    def _change(self, pid: int, before: int, after: int) -> None:
        found, short = self._device.ledger.locked(Ledger.change, pid, before, after, self._device.capacity_bytes)
        if short is not None:
            raise self._device.full(*short)
        if found != before:
            raise _StepFailed(f"the process is {_STATES[found]}", f"进程状态为 {_STATES[found]}")

    def _fail(self, step: Step, pid: int) -> None:
        left = self.fatal.get(step)
        if left == "failed":
            self._device.ledger.locked(Ledger.set_state, pid, FAILED)
        elif left == "gone":
            os.kill(pid, signal.SIGKILL)
            while started_at(pid):
                time.sleep(0.001)
        raise _StepFailed(self.failure[step], self.failure[step])


class _StepFailed(Exception):
    """With its reason in English and Chinese."""
