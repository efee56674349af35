"""The memory of a model in a worker process, and what is left of the process after an offload."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..errors import (
    CapturedGraphs,
    CheckpointFailed,
    SelfMoveFailed,
    SelfMoveFreedNothing,
    SnapshotUnusable,
    WorkerDied,
)
from ..locks import renewed_in_children
from ..memory import SnapshotFolder
from ..memory.kept import KeptWeights
from ..memory.self_moving.workers import pid_is_alive
from ..observability.error_classification import is_out_of_device_memory
from ..sentences import Sentence
from .calls import Move, Sizes
from .process import KILLED_WITHIN_S, WorkerProcess
from .residue import ProcessResidue

logger = logging.getLogger(__name__)

ENDS_WITHIN_S = 30.0
"""Longest wait for a worker to end by itself after a release."""

Way = Literal["weights", "weights+checkpoint", "checkpoint"]

_IMMOVABLE = (CapturedGraphs, SelfMoveFailed, SelfMoveFreedNothing)
"""Errors of engines that cannot be offloaded part by part; nothing has moved."""


@dataclass(frozen=True)
class LastOffload:
    """How a model left the device: its weights alone, with a checkpoint of the rest, or a checkpoint of everything.

    ``bytes`` are those of the model, ``checkpoint_bytes`` those that the checkpoint took off the device.
    """

    way: Way
    bytes: int
    checkpoint_bytes: int | None
    seconds: float


class WorkerResident:
    """Moves the memory of the engine in a worker. A release ends the process.

    With a ``residue``, an offload also removes what the process holds beyond the weights: its CUDA context and
    workspaces. An engine that cannot be moved part by part is checkpointed as a whole, which takes longer.

    If the worker of an offloaded model ends, and its loader takes `kept_weights`, the model stays in main memory:
    ``renew`` returns a new worker whose loader gets these weights.
    """

    def __init__(
        self,
        worker: WorkerProcess,
        residue: ProcessResidue | None = None,
        renew: Callable[[KeptWeights], tuple[WorkerProcess, ProcessResidue | None]] | None = None,
    ) -> None:
        self.worker = worker
        self.last_offload: LastOffload | None = None
        self._residue = residue
        self._renew = renew
        #: The way of the current offload; None while the model is on the device.
        self._way: Way | None = None
        #: The weights as of the current offload, if they can outlive the worker; taken and dropped under the lock.
        self._kept: KeptWeights | None = None
        self._lock = renewed_in_children(threading.Lock())

    @property
    def _sizes(self) -> Sizes:
        return Sizes(host_bytes=self.outlived_bytes) if self.worker.ended else self.worker.sizes

    @property
    def kept_bytes(self) -> int | None:
        """Bytes of weights in main memory that outlive the worker; None if its loader does not take them."""
        kept = self._kept
        return (kept.nbytes if kept else 0) if self.worker.sizes.takes_kept else None

    @property
    def outlived_bytes(self) -> int:
        """The same of an ended worker, else 0."""
        return self.kept_bytes or 0 if self.worker.ended else 0

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
        """False once it or a process that its engine needs has ended, or if only a new engine can serve requests."""
        if self.worker.ended:
            return self._kept is not None
        sizes = self.worker.sizes
        return sizes.usable and all(map(pid_is_alive, sizes.pids))

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes that the engine needs beside the worker."""
        return self._sizes.pids

    @property
    def moves_itself(self) -> bool:
        return self._sizes.moves_itself

    def offload(self) -> int:
        if self._way is not None:
            return 0
        began_s, on_device_bytes = time.monotonic(), self.device_bytes
        way: Way = "weights"
        moved_bytes: int
        try:
            moved_bytes, self._kept = self.worker.ask(Move("offload"))
        except _IMMOVABLE as error:
            if self._residue is None or not self._residue.removable:
                raise
            logger.info("%s: checkpointed as a whole. %s", self.worker.name, error)
            self._residue.remove()
            way, moved_bytes = "checkpoint", on_device_bytes
        else:
            way = "weights+checkpoint" if self._checkpoint_rest() else "weights"
        checkpoint_bytes = 0 if way == "weights" or self._residue is None else self._residue.removed_bytes
        self._way = way
        self.last_offload = LastOffload(way, moved_bytes, checkpoint_bytes, time.monotonic() - began_s)
        return moved_bytes

    def restore(self) -> int:
        if self._way is None:
            return 0
        try:
            moved_bytes = self._bring_back()
        except WorkerDied:
            moved_bytes = self._start_again()
        self._way = None
        self.forget_kept()
        return moved_bytes

    def _bring_back(self) -> int:
        if self.worker.ended:
            raise self.worker.died()
        if self.worker.checkpointed and self._residue is not None:
            self._residue.put_back()
        if self._way == "checkpoint":
            return self._sizes.device_bytes
        try:
            moved_bytes: int = self.worker.ask(Move("restore"))[0]
        except Exception:
            self._checkpoint_rest()
            raise
        return moved_bytes

    def _start_again(self) -> int:
        """Loads the model of an ended worker in a new one, from its weights. Raises `WorkerDied` without them."""
        with self._lock:
            kept, self._kept = self._kept, None
        died = self.worker.died()
        if kept is None or self._renew is None:
            raise died
        self.worker.finish(KILLED_WITHIN_S)
        try:
            kept.file.seal()
        except OSError:  # a process can still write to them
            kept.file.close()
            raise died from None
        try:
            self.worker, self._residue = self._renew(kept)
        except Exception as error:
            if is_out_of_device_memory(error):
                self._kept = kept  # for another try
            else:
                kept.file.close()
            raise
        kept.file.close()
        return self.device_bytes

    def leave_device(self) -> None:
        """Ends the process of an offloaded model whose weights outlive it: its context leaves the device.

        Callable in any thread. Does nothing if the model would have to be loaded from its files, or holds nothing.
        """
        if self._way == "weights" and self._kept is not None and not self.worker.ended:
            self.worker.kill(
                Sentence("the device had no room for its CUDA context", "设备没有空间容纳它的 CUDA 上下文")
            )
            self.worker.finish(KILLED_WITHIN_S)

    def forget_kept(self) -> int:
        """Frees weights that outlive the worker; returns their bytes."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is None:
            return 0
        kept.file.close()
        return kept.nbytes

    def release(self) -> int:
        freed_bytes = self.device_bytes + self.host_bytes
        self.forget_kept()
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
            if self.worker.ended and self._kept is None:
                raise self.worker.died() from error
            if self.worker.ended:
                return False  # the weights outlive it
            logger.warning("%s: its CUDA context stays on the device. %s", self.worker.name, error)
            return False
        return True
