"""The memory of a model in a worker process."""

from __future__ import annotations

import logging

from ..contracts import SnapshotStore
from ..errors import SnapshotUnusable
from ..sentences import Sentence
from .calls import Move, Sizes
from .process import WorkerProcess

logger = logging.getLogger(__name__)

ENDS_WITHIN_S = 30.0
"""Longest wait for a worker to end by itself after a release."""


class WorkerResident:
    """Moves the memory of the engine in a worker. A release ends the process."""

    def __init__(self, worker: WorkerProcess) -> None:
        self.worker = worker

    @property
    def _sizes(self) -> Sizes:
        return Sizes() if self.worker.ended else self.worker.sizes

    @property
    def device_bytes(self) -> int:
        return self._sizes.device_bytes

    @property
    def host_bytes(self) -> int:
        return self._sizes.host_bytes

    @property
    def array_bytes(self) -> int:
        return self._sizes.array_bytes

    @property
    def usable(self) -> bool:
        """False once the process has ended, or if only a new engine can serve requests."""
        return not self.worker.ended and self.worker.sizes.usable

    @property
    def moves_itself(self) -> bool:
        return self._sizes.moves_itself

    def offload(self) -> int:
        return int(self.worker.ask(Move("offload")))

    def restore(self) -> int:
        return int(self.worker.ask(Move("restore")))

    def release(self) -> int:
        freed_bytes = self.device_bytes + self.host_bytes
        if not self.worker.ended:
            try:
                self.worker.ask(Move("release"))  # parts with processes of their own end them
            except Exception as error:
                logger.warning("%s: its worker process is ended. %s", self.worker.name, error)
                self.worker.kill(Sentence("it could not release its engine", "它无法释放引擎"))
        self.worker.finish(ENDS_WITHIN_S)
        return freed_bytes

    def save(self, store: SnapshotStore, name: str) -> int:
        raise SnapshotUnusable(name, Sentence("its worker process ends with the release", "其工作进程随释放而结束"))

    def load(self, store: SnapshotStore, name: str) -> int:
        raise SnapshotUnusable(name, Sentence("its worker process has ended", "其工作进程已结束"))
