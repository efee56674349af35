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
"""Minimum interval of progress reports to listeners."""


def waiting_for(managed: ManagedModel) -> int:
    """Returns the number of requests in a model's queue."""
    return sum(1 for _ in managed.leases.waiting())


class Notifier:
    """Sends events to listeners and logs moves; never waits. `tell` needs the dispatcher's lock, to keep the order."""

    def __init__(self, device: Device, clock: Clock) -> None:
        self._device = device
        self._clock = clock
        self.listeners = Subscribers()

    def tell_progress(self, task: MoveTask) -> None:
        now_s = self._clock.now()
        if self.listeners and now_s >= task.told_s + PROGRESS_EVERY_S:
            task.told_s = now_s
            self.tell("progress", task)

    def tell(self, what: What, task: MoveTask, error: BaseException | None = None) -> None:
        if not self.listeners:
            return
        now_s, kind = self._clock.now(), self._device.kind
        phase, done_bytes, total_bytes = task.progress.facts
        error = error or task.error
        event = Event(
            what,
            task.managed.name,
            task.move.source.shown(kind),
            task.move.target.shown(kind),
            now_s,
            waiting_for(task.managed),
            now_s - task.started_s,
            phase,
            done_bytes,
            total_bytes,
            task.progress.bytes_per_s,
            in_words(error) if error else None,
        )
        self.listeners.tell(event)

    def tell_queue(self, managed: ManagedModel) -> None:
        """Reports a change of a model's queue."""
        if self.listeners:
            state = managed.state.shown(self._device.kind)
            self.listeners.tell(Event("queue", managed.name, state, state, self._clock.now(), waiting_for(managed)))

    def warn_of_budget(self, task: MoveTask, budget_bytes: float) -> None:
        """Warns that a model, at its first arrival, exceeds the budget; its next request will be refused."""
        logger.warning(
            "%s takes %s bytes, more than the budget of %s: the next request for it will be refused. Raise the budget "
            "(--gpu-budget, or budget_bytes). / %s 超出显存预算，下次请求将被拒绝，请调大预算。",
            task.managed.name, f"{task.moved_bytes:,}", f"{budget_bytes:,.0f}", task.managed.name,
        )  # fmt: skip

    def tell_outside(self, task: MoveTask) -> None:
        """Warns once about a model with memory that no move frees."""
        managed, kind = task.managed, task.move.via
        if managed.memory.outside_reported or task.error is not None:
            return
        if managed.memory.outside is not None and managed.memory.outside.holders:
            managed.memory.outside_reported = True
            size = readable_bytes(managed.memory.outside.held_bytes)
            pids = ", ".join(str(holder.pid) for holder in managed.memory.outside.holders)
            logger.warning(
                "%s holds %s outside the books (pid %s), in memory that is neither a tensor nor an ONNX session: "
                "offload does not move it; a release frees it, except in child processes that go on running. / "
                "%s 有 %s 账外占用（进程 %s），既不是张量也不是 ONNX 会话：卸载不会移动它；释放模型可以腾出，"
                "仍在运行的子进程除外。",
                managed.name, size, pids, managed.name, size, pids,
            )  # fmt: skip
        elif kind is State.LOADING and self._device.separate and not managed.memory.device_bytes:
            managed.memory.outside_reported = True
            logger.warning(
                "%s: nothing was found in its engine that can leave %s, so offload frees nothing; release does. / "
                "%s：引擎中没有可以移动的内容，卸载不会腾出显存，请使用完全释放。",
                managed.name, Sentence.of(self._device.name).en, managed.name,
            )  # fmt: skip

    def log(self, task: MoveTask) -> None:
        name, move, elapsed_s = task.managed.name, task.move, self._clock.now() - task.started_s
        if task.error is not None:
            waits = " and waits for room" if task.put_off else ""
            level = logging.INFO if task.put_off else logging.ERROR
            logger.log(
                level,
                "%s: %s failed%s, back to %s: %s",
                name,
                move.via.value,
                waits,
                task.back_at.value,
                in_words(task.error),
            )
            return
        source, target = (state.shown(self._device.kind) for state in (move.source, move.target))
        logger.info(
            "%s: %s -> %s, %s in %.3f s (%s)",
            name, source, target, readable_bytes(task.moved_bytes), elapsed_s, self._device.name,
        )  # fmt: skip
