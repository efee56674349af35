"""What the worker processes of models hold, for the status. Measuring neither counts as use nor waits for moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..contracts import InWorker, WorkerState
from ..observability.outside_memory import ProcessMemory
from ..status_types import WorkerStatus
from .dispatcher import Dispatcher
from .managed_model import ManagedModel

REMEASURE_EVERY_S = 1.0


@dataclass(frozen=True)
class _Seen:
    """A measurement. ``key``: what it depends on; another key asks for a new one."""

    key: tuple[object, ...]
    at_s: float
    memory: ProcessMemory
    context_bytes: int | None


class Workers:
    """Measures worker processes, each at most every `REMEASURE_EVERY_S` while its model stays where it is.

    ``measure`` returns the memory of the process with that pid and of its descendants, None if it has ended;
    ``loading`` the worker in which a model of that name is being loaded.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        measure: Callable[[int], ProcessMemory | None],
        loading: Callable[[str], WorkerState | None],
    ) -> None:
        dispatcher.outside.isolated = True
        self._dispatcher = dispatcher
        self._measure = measure
        self._loading = loading
        self._seen: dict[ManagedModel, _Seen] = {}

    def measure(self) -> None:
        """Renews old measurements. Called without the lock."""
        dispatcher = self._dispatcher
        with dispatcher.lock:
            now_s = dispatcher.clock.now()
            workers = {managed: self._worker_locked(managed) for managed in dispatcher.managed_models.values()}
            due = {managed: (worker.pid, _key(managed, worker)) for managed, worker in workers.items() if worker}
            self._seen = {managed: seen for managed, seen in self._seen.items() if managed in due}
        for managed, (pid, key) in due.items():
            seen = self._seen.get(managed)
            if seen is not None and seen.key == key and now_s < seen.at_s + REMEASURE_EVERY_S:
                continue
            if (memory := self._measure(pid)) is not None:
                with dispatcher.lock:
                    self._note_locked(managed, key, now_s, memory)

    def status_locked(self, managed: ManagedModel) -> WorkerStatus | None:
        """Returns the worker of a model; sizes are None until it has been measured."""
        worker = self._worker_locked(managed)
        if worker is None:
            return None
        seen = self._seen.get(managed)
        if seen is not None and seen.memory.pid != worker.pid:
            seen = None
        last = managed.resident.last_offload if isinstance(managed.resident, InWorker) else None
        return {
            "pid": worker.pid,
            "device_bytes": seen.memory.device_bytes if seen else None,
            "host_bytes": seen.memory.host_bytes if seen else None,
            "context_bytes": seen.context_bytes if seen else None,
            "checkpointed": worker.checkpointed,
            "last_offload": last
            and {
                "way": last.way,
                "bytes": last.bytes,
                "checkpoint_bytes": last.checkpoint_bytes,
                "seconds": round(last.seconds, 3),
            },
        }

    def _worker_locked(self, managed: ManagedModel) -> WorkerState | None:
        task = managed.move_task
        resident = (task.resident if task is not None else None) or managed.resident
        worker = resident.worker if isinstance(resident, InWorker) else self._loading(managed.name)
        return None if worker is None or worker.ended else worker

    def _note_locked(self, managed: ManagedModel, key: tuple[object, ...], now_s: float, memory: ProcessMemory) -> None:
        before, use = self._seen.get(managed), managed.memory
        worker = self._worker_locked(managed)
        if worker is None or _key(managed, worker) != key:  # it has moved meanwhile
            return
        if worker.checkpointed:
            memory = ProcessMemory(memory.pid, memory.started_s, memory.command, memory.host_bytes, 0)
        context_bytes = memory.device_bytes
        if context_bytes is not None and managed.move_task is None:
            context_bytes = max(0, context_bytes - use.device_bytes)
        elif context_bytes is not None:  # the sizes are those before the move
            known_bytes = (
                before.context_bytes or 0 if before and before.memory.pid == memory.pid else worker.context_bytes
            )
            context_bytes = min(context_bytes, known_bytes)
        self._seen[managed] = _Seen(key, now_s, memory, context_bytes)
        outside = use.outside
        if managed.move_task is None and not worker.checkpointed:  # a checkpoint is in main memory, too
            sizes = use.device_bytes, use.host_bytes
            use.outside = self._dispatcher.outside.of_worker(memory, sizes, worker.modules)
        if use.outside != outside or before is None or before.memory.device_bytes != memory.device_bytes:
            self._dispatcher.version += 1


def _key(managed: ManagedModel, worker: WorkerState) -> tuple[object, ...]:
    use = managed.memory
    return worker.pid, managed.move_task is None, use.device_bytes, use.host_bytes, worker.checkpointed
