"""Reports moves to the log and to listeners."""

from __future__ import annotations

import logging

from ..contracts import Clock, Device
from ..observability.error_classification import in_words
from ..observability.events import Event, Subscribers, What
from ..sentences import Sentence
from ..states import State
from ..units import readable_bytes
from .managed_model import ManagedModel
from .mover import MoveTask

logger = logging.getLogger("residency.moves")

PROGRESS_EVERY_S = 0.1
"""Minimum interval of progress reports to listeners within a phase; a new phase is reported at once."""


class Notifier:
    """Sends events to listeners and logs moves; never waits. Reports need the dispatcher's lock, to keep the order."""

    def __init__(self, device: Device, clock: Clock) -> None:
        self._device = device
        self._clock = clock
        self.listeners = Subscribers()

    def report_progress(self, task: MoveTask) -> None:
        now_s, phase = self._clock.now(), task.progress.facts[0]
        if self.listeners and (phase != task.reported_phase or now_s >= task.reported_s + PROGRESS_EVERY_S):
            task.reported_s, task.reported_phase = now_s, phase
            self.report("progress", task)

    def report(self, what: What, task: MoveTask, error: BaseException | None = None) -> None:
        if not self.listeners:
            return
        now_s = self._clock.now()
        source, target = (state.shown(self._device.kind) for state in (task.move.source, task.move.target))
        phase, done_bytes, total_bytes = task.progress.facts
        error = error or task.error
        self.listeners.publish(
            Event(what, task.managed.name, source, target, now_s, task.managed.leases.count_waiting(),
                  now_s - task.started_s, phase, done_bytes, total_bytes, task.progress.bytes_per_s,
                  in_words(error) if error else None)
        )  # fmt: skip

    def report_queue(self, managed: ManagedModel) -> None:
        """Reports a change of a model's queue."""
        if self.listeners:
            state, waiting = managed.state.shown(self._device.kind), managed.leases.count_waiting()
            self.listeners.publish(Event("queue", managed.name, state, state, self._clock.now(), waiting))

    def warn_of_budget(self, task: MoveTask, budget_bytes: float) -> None:
        """Warns that a model, at its first arrival, exceeds the budget; its next request will be refused."""
        logger.warning(
            "%s takes %s bytes, more than the budget of %s: the next request for it will be refused. Raise the budget "
            "(--gpu-budget, or budget_bytes). / %s 超出显存预算，下次请求将被拒绝，请调大预算。",
            task.managed.name, f"{task.moved_bytes:,}", f"{budget_bytes:,.0f}", task.managed.name,
        )  # fmt: skip

    def warn_of_unmanaged(self, task: MoveTask) -> None:
        """Warns once about a model with memory that no move frees."""
        name, memory = task.managed.name, task.managed.memory
        if memory.outside_reported or task.error is not None:
            return
        if memory.outside is not None and memory.outside.holders:
            size = readable_bytes(memory.outside.held_bytes)
            pids = ", ".join(str(holder.pid) for holder in memory.outside.holders)
            logger.warning(
                "%s has %s of unmanaged memory (pid %s), which is neither a tensor nor an ONNX session: offload does "
                "not move it; a release frees it, except in child processes that go on running. / "
                "%s 有 %s 未受管理的内存（进程 %s），既不是张量也不是 ONNX 会话：卸载不会移动它；释放模型可以腾出，"
                "仍在运行的子进程除外。",
                name, size, pids, name, size, pids,
            )  # fmt: skip
        elif (
            task.move.via is State.LOADING
            and self._device.separate
            and not memory.device_bytes
            and not getattr(task.managed.resident, "moves_itself", False)
        ):
            logger.warning(
                "%s: nothing was found in its engine that can leave %s, so offload frees nothing; release does. / "
                "%s：引擎中没有可以移动的内容，卸载不会腾出显存，请使用完全释放。",
                name, Sentence.of(self._device.name).en, name,
            )  # fmt: skip
        else:
            return
        memory.outside_reported = True

    def log(self, task: MoveTask) -> None:
        name, move = task.managed.name, task.move
        if task.error is not None:
            level, waits = (logging.INFO, " and waits for room") if task.put_off else (logging.ERROR, "")
            words = in_words(task.error)
            logger.log(level, "%s: %s failed%s, back to %s: %s", name, move.via.value, waits, task.back_at.value, words)
            return
        source, target = (state.shown(self._device.kind) for state in (move.source, move.target))
        size, elapsed_s = readable_bytes(task.moved_bytes), self._clock.now() - task.started_s
        logger.info("%s: %s -> %s, %s in %.3f s (%s)", name, source, target, size, elapsed_s, self._device.name)
