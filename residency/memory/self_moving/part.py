"""An object that moves itself, as a resident: its own functions are called in order, and its memory is measured."""

from __future__ import annotations

import inspect
import logging
import os
import weakref
from collections.abc import Callable
from typing import Any

from ...contracts import Device
from ...errors import (
    DeviceOutOfMemory,
    ResidencyError,
    SelfMoveFailed,
    SelfMoveFreedNothing,
    SnapshotUnusable,
    WorkerEnded,
)
from ...observability.error_classification import in_words, message_of, says_full
from ...observability.process_memory import claim, own_bytes, private_bytes, unclaim
from ...progress import current
from ...sentences import Sentence
from ..snapshot import SnapshotFolder
from .moves import OwnMoves
from .orphans import end_with_this_process
from .watch import Watch
from .workers import end, is_alive, workers_of

logger = logging.getLogger(__name__)

_NOISE_BYTES = 64 << 20
"""For smaller objects an offload that frees nothing is not detected."""

_parts: weakref.WeakValueDictionary[int, SelfMovingPart] = weakref.WeakValueDictionary()
"""By the ``id`` of their objects."""


def is_managed(thing: Any) -> bool:
    """Returns whether a `SelfMovingPart` moves this object."""
    part = _parts.get(id(thing))
    return part is not None and part.thing is thing


class SelfMovingPart:
    """One object of an engine that moves itself, with its worker processes.

    Its sizes are measured after each move: GPU memory of worker processes by the driver, their main memory by the
    system. Without worker processes, or where the driver does not list them, its first offload shows its size, as the
    difference of the memory in use; until then it counts as 0, and the model's ``outside_bytes`` include it.
    """

    def __init__(self, path: str, thing: Any, moves: OwnMoves, device: Device) -> None:
        self.thing = thing
        self.device_bytes = self.host_bytes = 0
        self._path = path
        self._moves = moves
        self._device = device
        self._moves_here = device.separate and moves.on_gpu(thing)
        self._workers = workers_of(thing)
        self._offloaded = False
        self._half_moved = False
        self._restored_bytes = 0
        ended = moves.worker_ended if self._workers else None
        self._watch = Watch(thing, self._workers, ended) if ended else None
        claim(self._workers)
        end_with_this_process(self._workers)
        _parts[id(thing)] = self
        self._measure()

    @property
    def usable(self) -> bool:
        """Whether all its worker processes are alive, and no failed move has left it between GPU and main memory."""
        return self._is_alive() and not self._half_moved

    def _is_alive(self) -> bool:
        return all(map(is_alive, self._workers))

    @property
    def moves_itself(self) -> bool:
        """Whether an offload calls the object."""
        return self._moves_here

    def offload(self) -> int:
        if self._offloaded or not self._moves_here:
            return 0
        self._measure()
        known_bytes, before = self.device_bytes, self._used()
        self._call(self._moves.offload, undo=self._moves.restore)
        self._offloaded = True
        after = self._used()
        gpu_bytes, host_bytes = max(0, before[0] - after[0]), max(0, after[1] - before[1])
        if not self._measure():
            self.device_bytes, self.host_bytes = 0, host_bytes
        self._restored_bytes = max(known_bytes, gpu_bytes)
        if known_bytes >= _NOISE_BYTES and gpu_bytes < known_bytes // 10:
            raise SelfMoveFreedNothing(self._path, known_bytes, self._moves.remedy)
        return gpu_bytes

    def restore(self) -> int:
        if not self._offloaded:
            return 0
        needed_bytes, free_bytes = self._restored_bytes - self.device_bytes, self._device.memory().free_bytes
        if free_bytes is not None and needed_bytes > free_bytes and self.usable:
            raise DeviceOutOfMemory(needed_bytes, free_bytes, self._device.name)
        current().enter("sessions", needed_bytes)
        self._call(self._moves.restore, undo=self._moves.offload)
        self._offloaded = False
        if not self._measure():
            self.device_bytes, self.host_bytes = self._restored_bytes, 0
        return needed_bytes

    def release(self) -> int:
        freed_bytes = self.device_bytes + self.host_bytes
        if self.thing is not None:
            self._stop_watch()
            try:
                self._moves.release(self.thing)
            except Exception as error:
                logger.warning("%s cannot be shut down: %s", self._path, in_words(error))
            finally:
                end(self._workers)
                self.end_management()
        return freed_bytes

    def save(self, store: SnapshotFolder, name: str) -> int:
        raise SnapshotUnusable(name, Sentence(f"{self._path} moves itself", f"{self._path} 自行移动"))

    def load(self, store: SnapshotFolder, name: str) -> int:
        return 0

    def end_management(self) -> None:
        """Ends the management of the object; it stays as it is."""
        self._stop_watch()
        unclaim(self._workers)
        self._device.worker_bytes({process.pid: 0 for process in self._workers}, awake=False)
        self._moves_here, self._offloaded, self._workers, self.thing = False, False, [], None
        self.device_bytes = self.host_bytes = 0

    def _stop_watch(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def _call(self, move: Callable[[Any], object], undo: Callable[[Any], object]) -> None:
        """Calls a function of the object; its errors become those of this project."""
        try:
            if self._is_alive():
                _check_done(move(self.thing))
        except BaseException as error:  # also SystemExit of a library
            if not self._is_alive():
                raise WorkerEnded(self._path) from error
            self._undo(undo)
            if not isinstance(error, Exception):
                raise
            if self._offloaded and says_full(error):
                memory = self._device.memory()
                raise DeviceOutOfMemory(self._restored_bytes, memory.free_bytes, self._device.name) from error
            raise SelfMoveFailed(self._path, message_of(error)) from error
        if not self._is_alive():
            raise WorkerEnded(self._path)

    def _undo(self, undo: Callable[[Any], object]) -> None:
        try:
            undo(self.thing)
        except Exception as error:
            self._half_moved = True
            logger.warning("%s cannot be moved back: %s", self._path, in_words(error))

    def _measure(self) -> bool:
        """Sets the sizes from those of its worker processes; returns False if these are unknown."""
        found = self._device.worker_bytes(self._private(), awake=not self._offloaded) if self._workers else None
        if found is None:
            return False
        self.device_bytes, self.host_bytes = found
        return True

    def _used(self) -> tuple[int, int]:
        """Returns GPU and main memory in use: of its workers; else of this process; else of the whole GPU."""
        if self._workers and (found := self._device.worker_bytes(self._private(), awake=not self._offloaded)):
            return found
        host_bytes = sum(self._private().values()) if self._workers else own_bytes() or 0
        held = None if self._workers else self._device.held_by()
        if held is not None and os.getpid() in held:
            return held[os.getpid()], host_bytes
        memory = self._device.memory()
        return (memory.total_bytes or 0) - (memory.free_bytes or 0), host_bytes

    def _private(self) -> dict[int, int]:
        return {process.pid: private_bytes(process) or 0 for process in self._workers}


def _check_done(answer: object) -> None:
    """Raises `ResidencyError` for a coroutine, which has not done anything yet."""
    if inspect.iscoroutine(answer):
        answer.close()
        raise ResidencyError(
            "its function is asynchronous: register one that waits for the end of the move",
            "其函数是异步的：请注册一个会等待移动完成的函数",
        )
