"""Converts a managed model to the answer of ``GET /gpu/status``. Pure."""

from __future__ import annotations

import math
from typing import Literal

from ..contracts import Device, Memory
from ..states import Move, State
from ..status_types import DeviceStatus, HolderStatus, LastMove, ModelStatus, MoveProgress, NextMove
from .managed_model import ManagedModel
from .planner import next_deadline, next_step

_PENDING: dict[State, Literal["offload", "release"]] = {State.HOST: "offload", State.RELEASED: "release"}


def describe(managed: ManagedModel, now_s: float, device_kind: str, separate: bool) -> ModelStatus:
    outside = managed.memory.outside
    return {
        "state": managed.state.shown(device_kind),
        "device_bytes": managed.memory.device_bytes,
        "host_bytes": managed.memory.host_bytes,
        "size_bytes": managed.memory.size_bytes,
        "idle_s": _idle_s(managed, now_s),
        "leases": int(managed.leases.holder is not None),
        "holder": _holder(managed, now_s),
        "waiting": sum(1 for _ in managed.leases.waiting()),
        "keep_warm_s": _finite(managed.policy.keep_warm_s),
        "idle_timeout_s": _finite(managed.policy.idle_timeout_s),
        "policy": managed.policy.name,
        "pending": _PENDING[managed.wishes.pending_move] if managed.wishes.pending_move else None,
        "next": _next(managed, now_s, device_kind, separate),
        "progress": _progress(managed, now_s, device_kind),
        "last_move": _last_move(managed, device_kind),
        "last_error": managed.health.last_error,
        "outside_bytes": outside.total_bytes if outside else 0,
        "outside_processes": [process.as_dict() for process in outside.holders] if outside else [],
    }


def describe_device(
    device: Device, memory: Memory, budget_bytes: int | None, outside_bytes: int | None
) -> DeviceStatus:
    telemetry, note = device.telemetry(), device.note
    return {
        "name": device.name,
        "kind": device.kind,
        "total_bytes": memory.total_bytes,
        "free_bytes": memory.free_bytes,
        "process_bytes": memory.process_bytes,
        "peers_bytes": telemetry.peers_bytes,
        "power_w": telemetry.power_w,
        "budget_bytes": budget_bytes,
        "outside_bytes": outside_bytes,
        "note": {"en": note["en"], "zh": note["zh"]} if note else None,
    }


def _idle_s(managed: ManagedModel, now_s: float) -> float | None:
    if managed.leases.holder is not None:
        return 0.0
    return None if managed.times.idle_since_s is None else round(max(0.0, now_s - managed.times.idle_since_s), 3)


def _holder(managed: ManagedModel, now_s: float) -> HolderStatus | None:
    if managed.leases.holder is None:
        return None
    facts = managed.leases.holder.facts(now_s)
    return {
        "where": facts.where,
        "thread": facts.thread,
        "held_s": round(facts.held_s, 3),
        "waits_for": facts.waits_for,
    }


def _next(managed: ManagedModel, now_s: float, device_kind: str, separate: bool) -> NextMove | None:
    deadline_s = next_deadline(managed, now_s, separate)
    step = None if managed.move_task or deadline_s == math.inf else next_step(managed, deadline_s, separate)
    if not isinstance(step, Move):
        return None
    return {"to": step.target.place(device_kind), "in_s": round(deadline_s - now_s, 3)}


def _progress(managed: ManagedModel, now_s: float, device_kind: str) -> MoveProgress | None:
    task = managed.move_task
    if task is None:
        return None
    phase, done_bytes, total_bytes = task.progress.facts
    bytes_per_s = task.progress.bytes_per_s
    return {
        "to": task.move.target.place(device_kind),
        "phase": phase,
        "bytes": done_bytes,
        "total_bytes": total_bytes,
        "seconds": round(max(0.0, now_s - task.started_s), 3),
        "bytes_per_s": None if bytes_per_s is None else round(bytes_per_s),
    }


def _last_move(managed: ManagedModel, device_kind: str) -> LastMove | None:
    record = managed.last_move
    if record is None:
        return None
    return {
        "from": record.move.source.place(device_kind),
        "to": record.move.target.place(device_kind),
        "bytes": record.moved_bytes,
        "seconds": round(record.seconds, 6),
    }


def _finite(seconds: float) -> float:
    return -1 if seconds == math.inf else seconds
