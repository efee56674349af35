"""The header that says how long a request waited for its models, and why."""

from __future__ import annotations

from typing import Any


def server_timing(leases: list[Any], turn_s: float = 0.0) -> str:
    """Returns the header for the sum of the leases' waits (https://www.w3.org/TR/server-timing/), in milliseconds.

    ``turn_s``: seconds that the request has waited for earlier ones of its address, before it was in a queue. ``desc``
    names that wait, and the models if there are several: edits wait for the recognizer, then for the engine.
    """
    waits = [(lease.model, receipt) for lease in leases if (receipt := lease.receipt)]
    if not waits:
        return ""
    receipts = [receipt for _, receipt in waits]
    whys = [f"{model}: {receipt.sentence().en}" for model, receipt in waits]
    why = "; ".join(whys) if len(waits) > 1 else receipts[0].sentence().en
    if rounded_s := round(turn_s, 3):
        why = f"waited {rounded_s:g} s for earlier requests of the same address; {why}"
    parts = [f'wait;dur={1000 * (turn_s + sum(each.waited_s for each in receipts)):.1f};desc="{why}"']
    parts += [f"queue;dur={1000 * (turn_s + sum(each.queue_s for each in receipts)):.1f}"]
    for move in ("load", "restore"):
        if moves_s := [each.move_s for each in receipts if each.move == move]:
            parts += [f"{move};dur={1000 * sum(moves_s):.1f}"]
    return ", ".join(parts)
