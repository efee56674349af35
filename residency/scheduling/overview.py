"""Status and history of all models. A call does not count as use, and does not wait for moves."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..contracts import Memory
from ..observability.history import WINDOW_S
from ..observability.outside_memory import OutsideMemory, totals
from ..status_types import ModelUsage, Status, UsageHistory
from .dispatcher import Dispatcher
from .status import describe, describe_device

REMEASURE_EVERY_S = 1.0


class Overview:
    """Builds `status` and `history`. ``host_memory`` measures main memory, ``remeasure`` a model's child processes."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        budget_bytes: int | None,
        host_memory: Callable[[], Memory],
        remeasure: Callable[[OutsideMemory], OutsideMemory],
    ) -> None:
        self._dispatcher = dispatcher
        self._budget_bytes = budget_bytes
        self._host_memory = host_memory
        self._remeasure = remeasure
        self._remeasured_s = -math.inf

    def status(self) -> Status:
        """Returns device, host and models in bytes and seconds, None where unknown."""
        dispatcher, device = self._dispatcher, self._dispatcher.device
        memory, host = device.memory(), self._host_memory()
        self._measure_children()
        with dispatcher.lock:
            now_s = dispatcher.clock.now()
            dispatcher.card.seen(now_s, memory)
            managed_models = dispatcher.managed_models
            outside_device_bytes, outside_host_bytes = totals(
                managed.memory.outside for managed in managed_models.values()
            )
            models = {
                name: describe(managed, now_s, device.kind, device.separate) for name, managed in managed_models.items()
            }
        return {
            "enabled": True,
            "device": describe_device(device, memory, self._budget_bytes, outside_device_bytes),
            "host": {
                "total_bytes": host.total_bytes,
                "free_bytes": host.free_bytes,
                "process_bytes": host.process_bytes,
                "outside_bytes": outside_host_bytes,
            },
            "monitor": dispatcher.monitor.health(),
            "models": models,
        }

    def history(self) -> UsageHistory:
        """Returns counts since the start, the last moves, and the last 15 minutes of each model and of the card."""
        dispatcher = self._dispatcher
        with dispatcher.lock:
            now_s, kind = dispatcher.clock.now(), dispatcher.device.kind
            models: dict[str, ModelUsage] = {}
            for name, managed in dispatcher.managed_models.items():
                holder = managed.leases.holder
                models[name] = managed.history.as_dict(now_s, kind, holder.served_s if holder else None)
            return {"window_s": WINDOW_S, "device": dispatcher.card.as_dict(now_s), "models": models}

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
