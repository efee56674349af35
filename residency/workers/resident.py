"""The memory of a model in a worker process, and what is left of the process after an offload."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Literal

from ..errors import CapturedGraphs, CheckpointFailed, SelfMoveFailed, SelfMoveFreedNothing, SnapshotUnusable
from ..memory import SnapshotFolder
from ..sentences import Sentence
from .calls import Move, Sizes
from .process import WorkerProcess
from .residue import ProcessResidue

logger = logging.getLogger(__name__)

ENDS_WITHIN_S = 30.0
"""Longest wait for a worker to end by itself after a release."""

Way = Literal["weights", "weights+checkpoint", "checkpoint"]

_IMMOVABLE = (CapturedGraphs, SelfMoveFailed, SelfMoveFreedNothing)
"""Errors of engines that cannot be offloaded part by part; nothing has moved."""


@dataclass(frozen=True)
class LastOffload:
    """How a model left the device: its weights alone, with a checkpoint of the rest, or a checkpoint of everything."""

    way: Way
    bytes: int
    seconds: float


class WorkerResident:
    """Moves the memory of the engine in a worker. A release ends the process.

    With a ``residue``, an offload also removes what the process holds beyond the weights: its CUDA context and
    workspaces. An engine that cannot be moved part by part is checkpointed as a whole, which takes longer.
    """

    def __init__(self, worker: WorkerProcess, residue: ProcessResidue | None = None) -> None:
        self.worker = worker
        self.last_offload: LastOffload | None = None
        self._residue = residue
        #: The way of the current offload; None while the model is on the device.
        self._way: Way | None = None

    @property
    def _sizes(self) -> Sizes:
        return Sizes() if self.worker.ended else self.worker.sizes

    @property
    def device_bytes(self) -> int:
        return 0 if self._way == "checkpoint" else self._sizes.device_bytes

    @property
    def host_bytes(self) -> int:
        sizes = self._sizes
        return sizes.host_bytes + (sizes.device_bytes if self._way == "checkpoint" else 0)

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
        if self._way is not None:
            return 0
        began_s, on_device_bytes = time.monotonic(), self.device_bytes
        way: Way = "weights"
        try:
            moved_bytes = int(self.worker.ask(Move("offload")))
        except _IMMOVABLE as error:
            if self._residue is None or not self._residue.removable:
                raise
            logger.info("%s: checkpointed as a whole. %s", self.worker.name, error)
            self._residue.remove()
            way, moved_bytes = "checkpoint", on_device_bytes
        else:
            way = "weights+checkpoint" if self._checkpoint_rest() else "weights"
        self._way = way
        self.last_offload = LastOffload(way, moved_bytes, time.monotonic() - began_s)
        return moved_bytes

    def restore(self) -> int:
        if self._way is None:
            return 0
        if self.worker.checkpointed and self._residue is not None:
            self._residue.put_back()
        if self._way == "checkpoint":
            self._way = None
            return self.device_bytes
        try:
            moved_bytes = int(self.worker.ask(Move("restore")))
        except Exception:
            self._checkpoint_rest()
            raise
        self._way = None
        return moved_bytes

    def release(self) -> int:
        freed_bytes = self.device_bytes + self.host_bytes
        if self.worker.checkpointed:
            self.worker.kill(Sentence("it was released", "它已被释放"))
        elif not self.worker.ended:
            try:
                self.worker.ask(Move("release"))  # parts with processes of their own end them
            except Exception as error:
                logger.warning("%s: its worker process is ended. %s", self.worker.name, error)
                self.worker.kill(Sentence("it could not release its engine", "它无法释放引擎"))
        self.worker.finish(ENDS_WITHIN_S)
        return freed_bytes

    def save(self, store: SnapshotFolder, name: str) -> int:
        raise SnapshotUnusable(name, Sentence("its worker process ends with the release", "其工作进程随释放而结束"))

    def load(self, store: SnapshotFolder, name: str) -> int:
        raise SnapshotUnusable(name, Sentence("its worker process has ended", "其工作进程已结束"))

    def _checkpoint_rest(self) -> bool:
        """Checkpoints what the weights have left behind; returns False, with a warning, if it stays there."""
        if self._residue is None or self.worker.ended or not self._residue.removable:
            return False
        try:
            self._residue.remove()
        except CheckpointFailed as error:
            if self.worker.ended:
                raise self.worker.died() from error
            logger.warning("%s: its CUDA context stays on the device. %s", self.worker.name, error)
            return False
        return True
