"""What the processes of a worker hold on the device beyond the model's weights, and its checkpoints."""

from __future__ import annotations

import contextlib

import psutil

from ..contracts import Device, ProcessCheckpoints
from ..errors import CheckpointFailed
from ..progress import current
from ..sentences import Sentence
from .process import WorkerProcess

CHECKPOINT_WITHIN_S = 120.0
"""Time limit of each step of a checkpoint and of its restore."""


class ProcessResidue:
    """Checkpoints a worker, and those of its descendants that hold device memory (vLLM's); all of them, or none.

    ``device`` tells which processes hold memory; where it cannot, the worker alone is checkpointed.
    """

    def __init__(self, worker: WorkerProcess, checkpoints: ProcessCheckpoints, device: Device) -> None:
        self._worker = worker
        self._checkpoints = checkpoints
        self._device = device
        self._pids: list[int] = []
        #: What the last `remove` has taken off the device; None if unknown.
        self.removed_bytes: int | None = None

    @property
    def removable(self) -> bool:
        """False once the driver has refused, or the helper process could not start: it is not asked again."""
        return self._checkpoints.unavailable() is None

    def remove(self) -> None:
        """Raises `CheckpointFailed`; then the processes run as before, or the worker has been ended."""
        current().enter("checkpointing")
        holders = self._holders()
        self.removed_bytes = self._device.bytes_of(holders)
        self._worker.checkpointed = True
        try:
            for pid in holders:
                self._pids.append(pid)
                self._checkpoints.checkpoint(pid, CHECKPOINT_WITHIN_S)
        except BaseException:
            failed = self._pids.pop()
            if self._checkpoints.state(failed) != "running":
                self._worker.kill(Sentence("its checkpoint has failed", "为它创建检查点失败"))
            else:
                try:
                    self.put_back()
                except CheckpointFailed:  # another program has taken the room: half of the processes could not go on
                    self._worker.kill(Sentence("its checkpoint has failed", "为它创建检查点失败"))
            self._worker.checkpointed = False
            raise

    def put_back(self) -> None:
        """Raises `CheckpointFailed` if a process is still checkpointed (the device is full), else `WorkerDied`."""
        current().enter("resuming")
        while self._pids:
            pid = self._pids[-1]
            try:
                self._checkpoints.restore(pid, CHECKPOINT_WITHIN_S)
            except CheckpointFailed as error:
                if self._checkpoints.state(pid) == "checkpointed":
                    raise
                self._worker.kill(Sentence(f"it could not be restored ({error.en})", f"无法恢复它（{error.zh}）"))
                raise self._worker.died() from None
            self._pids.pop()
        self._worker.checkpointed = False

    def _holders(self) -> list[int]:
        """Returns the processes that hold device memory; descendants last, since the worker waits for them."""
        tree = [self._worker.pid]
        with contextlib.suppress(psutil.Error):
            tree += [child.pid for child in psutil.Process(self._worker.pid).children(recursive=True)]
        known = [pid for pid in tree if self._device.bytes_of([pid])]
        return known or tree[:1]
