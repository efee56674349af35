"""Attributes unmanaged memory, of this process or its children, to models: bytes beyond their recorded sizes. Pure.

The recorded size of a model is that of its tensors and sessions, without worker processes, CTranslate2, TensorRT and
numpy arrays. So the processes' memory is compared with the recorded sizes at the end of each move. A child process
belongs to the model whose move ends when the child is first seen, or to the only loaded model. Growth of this process's
device memory during a move of one model alone, beyond its recorded size, belongs to that model. So does device memory
that appears during its requests if no other model was loaded in that time, even if the program itself allocated it: the
two cannot be distinguished.

Of this process's main memory, only the numpy arrays found in the engine count, and growth during the load of this model
alone, if large: libraries and allocators keep freed memory, and a program that collects its results would be reported
as an engine that leaks, and its engine would be released without a snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..status_types import OutsideProcess

NOISE_BYTES = 64 << 20
"""Smaller amounts, or less than 5 % of a model's recorded size, are ignored: allocators and caches vary so much."""

GROWTH_BYTES = 256 << 20
"""The same for this process's growth in main memory during a load."""

MODULE_BYTES = 160 << 10
"""Allowance of main memory for each imported module (torch takes 142 KB each, others about 70)."""

CONTEXT_BYTES = 512 << 20
"""Allowance for a CUDA context and its libraries, on the card and in main memory each."""


@dataclass(frozen=True)
class ProcessMemory:
    """The bytes that one process uses in main memory and on the device; None where unknown."""

    pid: int
    started_s: float
    command: str
    host_bytes: int | None
    device_bytes: int | None = None

    def as_dict(self) -> OutsideProcess:
        return {"pid": self.pid, "command": self.command,
                "device_bytes": self.device_bytes, "host_bytes": self.host_bytes}  # fmt: skip


@dataclass(frozen=True)
class MemorySample:
    """Current memory of this process and its children. ``children`` is None where unknown."""

    own: ProcessMemory
    children: tuple[ProcessMemory, ...] | None
    modules: int


NO_SAMPLE = MemorySample(ProcessMemory(0, 0.0, "", None), None, 0)
"""The sample where measuring is impossible."""


@dataclass(frozen=True)
class OutsideMemory:
    """The processes with unmanaged memory of a model; ``known`` is False where it cannot be measured."""

    holders: tuple[ProcessMemory, ...] = ()
    known: bool = False

    @property
    def held_bytes(self) -> int:
        """The total, without unknown sizes."""
        return sum(map(_size, self.holders))

    @property
    def total_bytes(self) -> int | None:
        """The total; None where unknown."""
        return self.held_bytes if self.known else None


def totals(found: Iterable[OutsideMemory | None]) -> tuple[int | None, int | None]:
    """Returns the total (device, host) bytes; both None if any is unknown. Skips None, a model not measured yet."""
    looked_at = [outside for outside in found if outside is not None]
    if not all(outside.known for outside in looked_at):
        return None, None
    holders = [holder for outside in looked_at for holder in outside.holders]
    return sum(each.device_bytes or 0 for each in holders), sum(each.host_bytes or 0 for each in holders)


@dataclass(eq=False)
class _Window:
    before: MemorySample
    recorded: tuple[int, int]
    loads: bool
    alone: bool


@dataclass
class OutsideTracker:
    """Measures unmanaged memory at the begin and end of moves. The caller holds the manager's lock.

    Recorded sizes are (device, host) bytes. ``cuda``: the device has a context of its own. ``separate_memory``: its
    memory is not main memory. ``context_bytes``: size of a context that is not in main memory, on a simulated card.
    """

    cuda: bool
    separate_memory: bool
    context_bytes: int = 0
    #: Whether each engine is in a worker process, so that no memory of this process or its children belongs to one.
    isolated: bool = False
    _windows: dict[object, _Window] = field(default_factory=dict)
    _balance: dict[str, tuple[int, int]] = field(default_factory=dict)
    _owners: dict[tuple[int, float], str | None] = field(default_factory=dict)
    #: A model, and device memory of this process and recorded size at its arrival; None after a move of another model.
    _arrival: tuple[str, int, int] | None = None
    #: Memory of this process, and recorded sizes in main memory, before the first move.
    _base: tuple[MemorySample, int] | None = None

    def began(
        self,
        move: object,
        before: MemorySample,
        recorded: tuple[int, int],
        all_recorded: tuple[int, int],
        loads: bool = False,
    ) -> None:
        """Records the begin of a move of one model; ``all_recorded``: of all models. ``loads``: it builds an engine."""
        if self._base is None:
            self._base = before, self._in_main(all_recorded)
            self._owners.update({(child.pid, child.started_s): None for child in before.children or ()})
        for window in self._windows.values():
            window.alone = False
        self._windows[move] = _Window(before, recorded, loads, alone=not self._windows)

    def given_up(self, move: object) -> None:
        """Records a move that was given up; its growth belongs to no model."""
        self._arrival = None
        self._windows.pop(move, None)
        for window in self._windows.values():
            window.alone = False

    def ended(
        self,
        move: object,
        model: str,
        after: MemorySample,
        recorded: tuple[int, int],
        all_recorded: tuple[int, int],
        loaded: frozenset[str],
        array_bytes: int = 0,
        arrived: bool = False,
        released: bool = False,
    ) -> OutsideMemory:
        """Records the end of a move; returns the model's unmanaged memory.

        ``loaded``: the models that are loaded or moving. ``array_bytes``: bytes of numpy arrays in its engine.
        ``arrived``: it is on the device. ``released``: it has no engine.
        """
        window = self._windows.pop(move, None)
        if window is None:  # given up
            return OutsideMemory()
        if self.isolated:  # see `of_worker`
            return OutsideMemory(known=True)
        before, own = window.before.own, after.own
        owner = next(iter(loaded)) if len(loaded) == 1 and not window.loads else model
        for child in after.children or ():
            self._owners.setdefault((child.pid, child.started_s), owner)
        # Memory that a released engine did not free is not attributed to the new one.
        device, host = (0, 0) if window.loads else self._balance.get(model, (0, 0))
        known = own.host_bytes is not None and before.host_bytes is not None
        if window.alone and window.loads and known:
            host += _grown(own, before) - (self._in_main(recorded) - self._in_main(window.recorded))
            host -= MODULE_BYTES * max(0, after.modules - window.before.modules)
        if window.alone and own.device_bytes is not None:
            begun = before.device_bytes or 0, window.recorded[0]
            if self._arrival is not None and self._arrival[0] == model:
                begun = self._arrival[1:]
            device += own.device_bytes - begun[0] - (recorded[0] - begun[1])
        self._arrival = None
        if arrived and window.alone and loaded <= {model} and own.device_bytes is not None:
            self._arrival = model, own.device_bytes, recorded[0]
        self._balance[model] = device, host
        noise = max(NOISE_BYTES, sum(max(recorded, window.recorded)) // 20)
        host = _above(max(GROWTH_BYTES, noise), min(host, self._own_host(after, all_recorded))) if known else 0
        host = max(host, _above(NOISE_BYTES, array_bytes))
        own_device = (own.device_bytes or 0) - all_recorded[0] - CONTEXT_BYTES * self.cuda - self.context_bytes
        device = _above(noise, min(device, own_device))
        if released:  # memory that this process keeps belongs to no engine
            host = device = 0
        if not known or after.children is None:
            return OutsideMemory()
        children = [child for child in after.children if self._owners.get((child.pid, child.started_s)) == model]
        if sum(map(_size, children)) < NOISE_BYTES:
            children = []
        holders = [replace(own, host_bytes=host, device_bytes=device), *children]
        unknown = own.device_bytes is None and self.separate_memory
        return OutsideMemory(tuple(filter(_size, holders)), known=not unknown)

    def of_worker(self, worker: ProcessMemory, recorded: tuple[int, int], modules: int) -> OutsideMemory:
        """Returns the unmanaged main memory of a worker process with its descendants.

        That is memory beyond the recorded sizes and the modules that it has imported.
        """
        if worker.host_bytes is None:
            return OutsideMemory()
        noise = max(GROWTH_BYTES, sum(recorded) // 20)
        libraries_bytes = MODULE_BYTES * modules + CONTEXT_BYTES * self.cuda
        extra_bytes = worker.host_bytes - self._in_main(recorded) - libraries_bytes
        held = replace(worker, host_bytes=_above(noise, extra_bytes), device_bytes=0)
        return OutsideMemory((held,) if held.host_bytes else (), known=True)

    def _own_host(self, after: MemorySample, all_recorded: tuple[int, int]) -> int:
        assert self._base is not None, "a move that has ended had begun"
        before, recorded_bytes = self._base
        libraries = MODULE_BYTES * max(0, after.modules - before.modules) + CONTEXT_BYTES * self.cuda
        return _grown(after.own, before.own) - (self._in_main(all_recorded) - recorded_bytes) - libraries

    def _in_main(self, recorded: tuple[int, int]) -> int:
        """Returns the recorded bytes in main memory, including the device's if it has no memory of its own."""
        return recorded[1] if self.separate_memory else sum(recorded)


def _grown(after: ProcessMemory, before: ProcessMemory) -> int:
    return (after.host_bytes or 0) - (before.host_bytes or 0)


def _above(noise_bytes: int, nbytes: int) -> int:
    return nbytes if nbytes >= noise_bytes else 0


def _size(holder: ProcessMemory) -> int:
    return (holder.host_bytes or 0) + (holder.device_bytes or 0)
