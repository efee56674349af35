"""A slot in the words of ``GET /gpu/status``. Pure."""

from __future__ import annotations

import math
from typing import Any

from .states import Slot, State

_ASKED = {State.HOST: "offload", State.RELEASED: "release"}


def describe(slot: Slot, now_s: float, device_kind: str) -> dict[str, Any]:
    """One model's entry: bytes and seconds, None where unknown, -1 seconds for never."""
    record, resident = slot.last_move, slot.resident or slot.kept  # read once: a move may be changing it
    return {
        "state": slot.state.shown(device_kind),
        "device_bytes": resident.device_bytes if resident else 0,
        "host_bytes": resident.host_bytes if resident else 0,
        "idle_s": _idle_s(slot, now_s),
        "leases": int(slot.holder is not None),
        "waiting": len(slot.queue),
        "keep_warm_s": _finite(slot.policy.keep_warm_s),
        "idle_timeout_s": _finite(slot.policy.idle_timeout_s),
        "pending": _ASKED[slot.asked] if slot.asked else None,
        "last_move": {
            "from": record.move.source.shown(device_kind),
            "to": record.move.target.shown(device_kind),
            "bytes": record.moved_bytes,
            "seconds": round(record.seconds, 6),
        }
        if record
        else None,
        "last_error": slot.last_error,
    }


def _idle_s(slot: Slot, now_s: float) -> float | None:
    if slot.holder is not None:
        return 0.0
    return None if slot.idle_since_s is None else round(now_s - slot.idle_since_s, 3)


def _finite(seconds: float) -> float:
    return -1 if seconds == math.inf else seconds
