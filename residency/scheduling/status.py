"""Converts a managed model to the answer of ``GET /gpu/status``. Pure."""

from __future__ import annotations

import math
from typing import Any

from ..contracts import Device, Memory
from ..states import Move, State
from .managed_model import ManagedModel
from .planner import next_deadline, next_step

_ASKED = {State.HOST: "offload", State.RELEASED: "release"}


def describe(managed: ManagedModel, now_s: float, device_kind: str, separate: bool) -> dict[str, Any]:
    """One model's entry: bytes and seconds, None where unknown, -1 seconds for never."""
    record = managed.last_move
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
        "pending": _ASKED[managed.wishes.pending_move] if managed.wishes.pending_move else None,
        "next": _next(managed, now_s, device_kind, separate),
        "progress": _progress(managed, now_s, device_kind),
        "last_move": {
            "from": record.move.source.shown(device_kind),
            "to": record.move.target.shown(device_kind),
            "bytes": record.moved_bytes,
            "seconds": round(record.seconds, 6),
        }
        if record
        else None,
        "last_error": managed.health.last_error,
        "outside_bytes": managed.memory.outside.total_bytes if managed.memory.outside else 0,
        "outside_processes": [holder.as_dict() for holder in managed.memory.outside.holders]
        if managed.memory.outside
        else [],
    }


def describe_device(
    device: Device, memory: Memory, budget_bytes: int | None, outside_bytes: int | None
) -> dict[str, Any]:
    """The device's entry.

    ``budget_bytes`` is what models under management may take of it, if that is limited; ``outside_bytes`` is what all
    of them hold of it outside the books.
    """
    return {
        "name": device.name,
        "kind": device.kind,
        **vars(memory),
        **vars(device.telemetry()),
        "budget_bytes": budget_bytes,
        "outside_bytes": outside_bytes,
        "note": device.note,
    }


def _idle_s(managed: ManagedModel, now_s: float) -> float | None:
    if managed.leases.holder is not None:
        return 0.0
    return None if managed.times.idle_since_s is None else round(max(0.0, now_s - managed.times.idle_since_s), 3)


def _holder(managed: ManagedModel, now_s: float) -> dict[str, Any] | None:
    """The request that has the model, as `Holder` tells of it."""
    if managed.leases.holder is None:
        return None
    facts = managed.leases.holder.facts(now_s)
    return {**vars(facts), "held_s": round(facts.held_s, 3)}


def _next(managed: ManagedModel, now_s: float, device_kind: str, separate: bool) -> dict[str, Any] | None:
    """What its policy will do next, and in how many seconds; None if nothing, or not before something else happens."""
    deadline_s = next_deadline(managed, now_s, separate)
    step = None if managed.move_task or deadline_s == math.inf else next_step(managed, deadline_s, separate)
    if not isinstance(step, Move):
        return None
    return {"to": step.target.shown(device_kind), "in_s": round(deadline_s - now_s, 3)}


def _progress(managed: ManagedModel, now_s: float, device_kind: str) -> dict[str, Any] | None:
    """How far the move under way has come: seconds since it began, and the bytes and the rate of its phase."""
    task = managed.move_task
    if task is None:
        return None
    phase, done_bytes, total_bytes = task.progress.facts
    bytes_per_s = task.progress.bytes_per_s
    return {
        "to": task.move.target.shown(device_kind),
        "phase": phase,
        "bytes": done_bytes,
        "total_bytes": total_bytes,
        "seconds": round(max(0.0, now_s - task.started_s), 3),
        "bytes_per_s": None if bytes_per_s is None else round(bytes_per_s),
    }


def _finite(seconds: float) -> float:
    return -1 if seconds == math.inf else seconds
