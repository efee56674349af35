"""Checkpoints of processes that use a simulated card. Nothing is copied: the bytes leave the card's books."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable

from ..contracts import ProcessCheckpoints
from ..errors import CheckpointFailed
from ..sentences import Sentence
from .checkpoint_transitions import Call, Operation, State, follow
from .cpu import SimulatedDevice
from .ledger import CHECKPOINTED, FAILED, LOCKED, RUNNING, Ledger, started_at

_STATES: dict[int | None, State] = {
    RUNNING: "running", LOCKED: "locked", CHECKPOINTED: "checkpointed", FAILED: "failed", None: "gone",
}  # fmt: skip
_CHANGES: dict[Call, tuple[int, int]] = {
    "lock": (RUNNING, LOCKED),
    "checkpoint": (LOCKED, CHECKPOINTED),
    "restore": (CHECKPOINTED, LOCKED),
    "unlock": (LOCKED, RUNNING),
}


class SimulatedCheckpoints(ProcessCheckpoints):
    """Checkpoints on a simulated card. A checkpointed process runs on, but its calls of the card wait. Thread-safe.

    Each copy takes the time of its bytes at ``bytes_per_s``, which is only given to ``sleep``.

    For tests: ``failure`` has the messages of calls that fail. Such a call changes nothing, unless ``leaves`` has the
    state that it leaves; for ``gone`` the process is killed.
    """

    def __init__(
        self, device: SimulatedDevice, bytes_per_s: float = math.inf, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self.failure: dict[Call, str] = {}
        self.leaves: dict[Call, State] = {}
        self._device, self._sleep = device, sleep

    def unavailable(self) -> Sentence | None:
        if hasattr(os, "memfd_create"):
            return None
        return Sentence("processes share a simulated GPU on Linux only", "仅 Linux 支持多个进程共用模拟 GPU")

    def checkpoint(self, pid: int, timeout_s: float) -> None:
        self._run("checkpoint", pid, timeout_s)

    def restore(self, pid: int, timeout_s: float) -> None:
        self._run("restore", pid, timeout_s)

    def state(self, pid: int) -> State:
        return _STATES[self._device.ledger.locked(Ledger.state_of, pid)]

    def close(self) -> None:
        return

    def _run(self, operation: Operation, pid: int, timeout_s: float) -> None:
        failed = follow(operation, lambda call: self.make(call, pid, timeout_s), CallFailed, lambda _: self.state(pid))
        if failed is not None:
            (call, reason), then = failed[0].args, failed[1].value
            reason = Sentence(f"{reason.en.rstrip('.')}; {then.en}", f"{reason.zh.rstrip('。')}；{then.zh}")
            raise CheckpointFailed(pid, call, reason) from (failed[0].__cause__ or failed[0])

    def make(self, call: Call, pid: int, timeout_s: float) -> None:
        """Makes one call; raises `CallFailed`, caused by a `DeviceOutOfMemory` on a full card."""
        if call in self.failure:
            self._fail(call, pid)
        nbytes = self._device.ledger.locked(Ledger.bytes_in, pid) if call in ("checkpoint", "restore") else 0
        seconds = nbytes / self.bytes_per_s
        if seconds > timeout_s:
            self._sleep(timeout_s)
            words = Sentence(f"it takes longer than {timeout_s:g} s", f"耗时超过 {timeout_s:g} 秒")
            raise CallFailed(call, words)
        if call == "restore":  # the bytes are on the card from its begin, and after a checkpoint until its end
            self._change(call, pid)
        if seconds:
            self._sleep(seconds)
        if call != "restore":
            self._change(call, pid)

    def _change(self, call: Call, pid: int) -> None:
        found, short = self._device.ledger.locked(Ledger.change, pid, *_CHANGES[call], self._device.capacity_bytes)
        if short is not None:
            full = self._device.full(*short)
            raise CallFailed(call, Sentence(full.en, full.zh)) from full
        if found != _CHANGES[call][0]:
            raise CallFailed(call, Sentence(f"the process is {_STATES[found]}", f"进程状态为 {_STATES[found]}"))

    def _fail(self, call: Call, pid: int) -> None:
        left = self.leaves.get(call)
        if left == "gone":
            os.kill(pid, signal.SIGKILL)
            while started_at(pid):
                time.sleep(0.001)
        elif left is not None:
            number = next(number for number, state in _STATES.items() if state == left)
            self._device.ledger.locked(Ledger.set_state, pid, number)
        raise CallFailed(call, Sentence.of(self.failure[call]))


class CallFailed(Exception):
    """A call that did not succeed, with its reason."""
