"""Status and history of all models. A call does not count as use, and does not wait for moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from ..contracts import InWorker, Memory
from ..observability.history import WINDOW_S
from ..observability.outside_memory import OutsideMemory, totals
from ..receipts import Receipt
from ..states import Move, State
from ..status_types import (
    DeviceStatus,
    MemorySizes,
    ModelStatus,
    MoveProgress,
    NextMove,
    SharingStatus,
    Status,
    UsageHistory,
)
from .dispatcher import Dispatcher
from .managed_model import ManagedModel
from .planner import next_deadline, next_step
from .worker_status import Workers

REMEASURE_EVERY_S = 1.0

_PENDING: dict[State, Literal["offload", "release"]] = {State.HOST: "offload", State.RELEASED: "release"}


class Overview:
    """Builds `status` and `history`. ``host_memory`` measures main memory, ``remeasure`` a model's child processes.

    ``workers``: the worker processes of the models, with process isolation. ``sharing``: see `Status`.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        budget_bytes: int | None,
        host_memory: Callable[[], Memory],
        remeasure: Callable[[OutsideMemory], OutsideMemory],
        workers: Workers | None = None,
        sharing: Callable[[], SharingStatus | None] = lambda: None,
    ) -> None:
        self._dispatcher = dispatcher
        self._budget_bytes = budget_bytes
        self._host_memory = host_memory
        self._remeasure = remeasure
        self._workers = workers
        self._sharing = sharing
        self._remeasured_s = -math.inf

    def status(self) -> Status:
        """Returns device, host and models in bytes and seconds, None where unknown."""
        dispatcher = self._dispatcher
        memory, host = dispatcher.device.memory(), self._host_memory()
        if self._workers is not None:
            self._workers.measure()
        else:
            self._measure_children()
        with dispatcher.lock:
            now_s = dispatcher.clock.now()
            dispatcher.device_history.note(now_s, memory)
            device_bytes, host_bytes = totals(each.memory.outside for each in dispatcher.managed_models.values())
            models = {name: self._model(managed, now_s) for name, managed in dispatcher.managed_models.items()}
        return {
            "enabled": True,
            "isolation": "none" if self._workers is None else "process",
            "device": self._device(_sizes(memory, device_bytes)),
            "host": _sizes(host, host_bytes),
            "monitor": dispatcher.monitor.health(),
            "sharing": self._sharing(),
            "models": models,
        }

    def history(self) -> UsageHistory:
        """Returns counts since the start, the last moves, and the last 15 minutes of each model and of the device."""
        dispatcher = self._dispatcher
        with dispatcher.lock:
            now_s, kind = dispatcher.clock.now(), dispatcher.device.kind
            holders = {name: managed.leases.holder for name, managed in dispatcher.managed_models.items()}
            models = {
                name: dispatcher.managed_models[name].history.as_dict(now_s, kind, holder.served_s if holder else None)
                for name, holder in holders.items()
            }
            return {"window_s": WINDOW_S, "device": dispatcher.device_history.as_dict(now_s), "models": models}

    def _measure_children(self) -> None:
        """Updates the memory of child processes with outside memory, at most every `REMEASURE_EVERY_S`."""
        dispatcher = self._dispatcher
        with dispatcher.lock:
            holding = {
                managed: managed.memory.outside
                for managed in dispatcher.managed_models.values()
                if managed.memory.outside and managed.memory.outside.holders
            }
            now_s = dispatcher.clock.now()
            if not holding or now_s < self._remeasured_s + REMEASURE_EVERY_S:
                return
            self._remeasured_s = now_s
        for managed, outside in holding.items():
            found = self._remeasure(outside)
            with dispatcher.lock:
                if managed.memory.outside is outside and found != outside:
                    managed.memory.outside = found
                    dispatcher.version += 1

    def _device(self, sizes: MemorySizes) -> DeviceStatus:
        device = self._dispatcher.device
        telemetry, note = device.telemetry(), device.note
        return {
            **sizes,
            "name": device.name,
            "kind": device.kind,
            "peers_bytes": telemetry.peers_bytes,
            "power_w": telemetry.power_w,
            "energy_wh": telemetry.energy_wh,
            "budget_bytes": self._budget_bytes,
            "note": {"en": note["en"], "zh": note["zh"]} if note else None,
        }

    def _model(self, managed: ManagedModel, now_s: float) -> ModelStatus:
        kind, memory, policy = self._dispatcher.device.kind, managed.memory, managed.policy
        outside, wishes, since_s = memory.outside, managed.wishes, managed.times.idle_since_s
        holder = managed.leases.holder.facts(now_s) if managed.leases.holder is not None else None
        idle_s = None if since_s is None else round(max(0.0, now_s - since_s), 3)
        return {
            "state": managed.state.shown(kind),
            "device_bytes": memory.device_bytes,
            "host_bytes": memory.host_bytes,
            "size_bytes": memory.size_bytes,
            "idle_s": 0.0 if holder else idle_s,
            "leases": int(holder is not None),
            "holder": None
            if holder is None
            else {
                "where": holder.where,
                "thread": holder.thread,
                "held_s": round(holder.held_s, 3),
                "waits_for": holder.waits_for,
            },
            "waiting": managed.leases.count_waiting(),
            "keep_warm_s": _finite(managed.keep_warm_s),
            "keep_warm_by": "policy" if managed.asked_warm_s is None else "request",
            "idle_timeout_s": _finite(policy.idle_timeout_s),
            "policy": policy.name,
            "pending": _PENDING[wishes.pending_move] if wishes.pending_move else None,
            "next": self._next(managed, now_s),
            "progress": self._progress(managed, now_s),
            "last_move": managed.last_move.as_dict(kind) if managed.last_move else None,
            "last_wait": Receipt.of(managed.last_wait).as_dict() if managed.last_wait else None,
            "last_error": managed.faults.last_error,
            "outside_bytes": outside.total_bytes if outside else 0,
            "outside_processes": [process.as_dict() for process in outside.holders] if outside else [],
            "worker": None if self._workers is None else self._workers.status_locked(managed),
            "kept_bytes": managed.resident.kept_bytes if isinstance(managed.resident, InWorker) else None,
        }

    def _next(self, managed: ManagedModel, now_s: float) -> NextMove | None:
        device = self._dispatcher.device
        deadline_s = next_deadline(managed, now_s, device.separate)
        step = None if managed.move_task or deadline_s == math.inf else next_step(managed, deadline_s, device.separate)
        if not isinstance(step, Move):
            return None
        return {"to": step.target.place(device.kind), "in_s": round(deadline_s - now_s, 3)}

    def _progress(self, managed: ManagedModel, now_s: float) -> MoveProgress | None:
        task = managed.move_task
        if task is None:
            return None
        phase, done_bytes, total_bytes = task.progress.facts
        bytes_per_s = task.progress.bytes_per_s
        return {
            "to": task.move.target.place(self._dispatcher.device.kind),
            "phase": phase,
            "bytes": done_bytes,
            "total_bytes": total_bytes,
            "seconds": round(max(0.0, now_s - task.started_s), 3),
            "bytes_per_s": None if bytes_per_s is None else round(bytes_per_s),
        }


def _sizes(memory: Memory, outside_bytes: int | None) -> MemorySizes:
    return {
        "total_bytes": memory.total_bytes,
        "free_bytes": memory.free_bytes,
        "process_bytes": memory.process_bytes,
        "outside_bytes": outside_bytes,
    }


def _finite(seconds: float) -> float:
    return -1 if seconds == math.inf else seconds
