"""Memory held outside the books: by this process or its children, beyond what the models are known to hold. Pure.

The books of a model are its tensors and sessions. A worker process, CTranslate2, TensorRT or a numpy array are not in
them, so what the processes hold is compared with the books at the end of each move. A child belongs to the model whose
move ends when the child is first seen, or to the only loaded model. Memory of the device that this process has come to
hold during a move of one model, beyond its books, is that model's; the growth during moves that overlap is no model's.
Device memory that appears during a model's requests is attributed to that model if no other model was loaded
meanwhile, also where the program itself takes it beside the manager: the two cannot be told apart.

Main memory of this process says little: libraries and allocators keep what they once had. Counted are the arrays of
numpy that were found in the engine, and by how much the process grew during the load of this model alone, if that is
much. What native code takes later, in a request, and keeps is not seen. The system has one counter for the process:
lists, results and caches of the program grow it in the same way, during a request too and for as long, and so does
freed memory that the heap keeps, unless it is trimmed at each move, which takes milliseconds. A program that collects
its results would be reported as an engine that leaks, and its engine would be released without a snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..status_types import OutsideProcess

NOISE_BYTES = 64 << 20
"""Smaller amounts, or less than 5 % of a model's books, are ignored: allocators and caches vary by that much."""

GROWTH_BYTES = 256 << 20
"""The same for the main memory by which this process grows during a load."""

MODULE_BYTES = 160 << 10
"""Main memory that one imported module is allowed (torch takes 142 KB each, others about 70)."""

CONTEXT_BYTES = 512 << 20
"""Not counted, on the card and in main memory each: a CUDA context and its libraries use as much."""


@dataclass(frozen=True)
class ProcessMemory:
    """The bytes that one process holds in main memory and on the device; None where unknown."""

    pid: int
    started_s: float
    command: str
    host_bytes: int | None
    device_bytes: int | None = None

    def as_dict(self) -> OutsideProcess:
        return {
            "pid": self.pid,
            "command": self.command,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
        }


@dataclass(frozen=True)
class MemorySample:
    """What this process and its children hold now. ``children`` is None where they are unknown."""

    own: ProcessMemory
    children: tuple[ProcessMemory, ...] | None
    modules: int


NO_SAMPLE = MemorySample(ProcessMemory(0, 0.0, "", None), None, 0)
"""Where nothing can be measured."""


@dataclass(frozen=True)
class OutsideMemory:
    """The processes that hold something beyond the books; not ``known`` where that cannot be measured."""

    holders: tuple[ProcessMemory, ...] = ()
    known: bool = False

    @property
    def total_bytes(self) -> int | None:
        """None where unknown."""
        return self.held_bytes if self.known else None

    @property
    def held_bytes(self) -> int:
        """As far as is known."""
        return sum(map(_size, self.holders))


def totals(found: Iterable[OutsideMemory | None]) -> tuple[int | None, int | None]:
    """The (device, host) bytes that these hold together; None for what was not looked at. Both None where unknown."""
    looked_at = [outside for outside in found if outside is not None]
    if not all(outside.known for outside in looked_at):
        return None, None
    holders = [holder for outside in looked_at for holder in outside.holders]
    return sum(each.device_bytes or 0 for each in holders), sum(each.host_bytes or 0 for each in holders)


@dataclass(eq=False)
class _Window:
    before: MemorySample
    books: tuple[int, int]
    loads: bool
    alone: bool


@dataclass
class OutsideBooks:
    """Attributes what is held outside the books. The caller holds the manager's lock.

    ``cuda``: the device has a context of its own; ``separate_memory``: its memory is not main memory.
    """

    cuda: bool
    separate_memory: bool
    _windows: dict[object, _Window] = field(default_factory=dict)
    _balance: dict[str, tuple[int, int]] = field(default_factory=dict)
    _owners: dict[tuple[int, float], str | None] = field(default_factory=dict)
    #: A model, and what this process and its books held of the device when it came there; None if others moved since.
    _arrival: tuple[str, int, int] | None = None
    #: What this process held, and what the books said, before the first move.
    _base: tuple[MemorySample, int] | None = None

    def began(
        self,
        move: object,
        before: MemorySample,
        books: tuple[int, int],
        all_books: tuple[int, int],
        loads: bool = False,
    ) -> None:
        """A move begins; ``books`` are the model's (device, host) bytes, ``all_books`` those of all models.

        ``loads``: it builds an engine.
        """
        if self._base is None:
            self._base = before, self._in_main(all_books)
            self._owners.update({(child.pid, child.started_s): None for child in before.children or ()})
        for window in self._windows.values():
            window.alone = False
        self._windows[move] = _Window(before, books, loads, alone=not self._windows)

    def given_up(self, move: object) -> None:
        """A move is not waited for any longer; its growth belongs to no model."""
        self._arrival = None
        self._windows.pop(move, None)
        for window in self._windows.values():
            window.alone = False

    def ended(
        self,
        move: object,
        model: str,
        after: MemorySample,
        books: tuple[int, int],
        all_books: tuple[int, int],
        loaded: frozenset[str],
        array_bytes: int = 0,
        arrived: bool = False,
        released: bool = False,
    ) -> OutsideMemory:
        """A move has ended: what the model holds outside its books now.

        ``loaded`` are the models that are loaded or moving, ``array_bytes`` what numpy's arrays hold in its engine.
        ``arrived``: it is on the device, ``released``: there is no engine any more.
        """
        window = self._windows.pop(move, None)
        if window is None:  # given up
            return OutsideMemory()
        owner = next(iter(loaded)) if len(loaded) == 1 and not window.loads else model
        for child in after.children or ():
            self._owners.setdefault((child.pid, child.started_s), owner)
        # Memory that a released engine has left is not attributed to the new one.
        device, host = (0, 0) if window.loads else self._balance.get(model, (0, 0))
        known = after.own.host_bytes is not None and window.before.own.host_bytes is not None
        if window.alone and window.loads and known:
            grown = _difference(after.own.host_bytes, window.before.own.host_bytes)
            host += grown - (self._in_main(books) - self._in_main(window.books))
            host -= MODULE_BYTES * max(0, after.modules - window.before.modules)
        if window.alone and after.own.device_bytes is not None:
            begun = window.before.own.device_bytes or 0, window.books[0]
            if self._arrival is not None and self._arrival[0] == model:
                begun = self._arrival[1:]
            device += after.own.device_bytes - begun[0] - (books[0] - begun[1])
        self._arrival = None
        if arrived and window.alone and loaded <= {model} and after.own.device_bytes is not None:
            self._arrival = model, after.own.device_bytes, books[0]
        self._balance[model] = device, host
        noise = max(NOISE_BYTES, sum(max(books, window.books)) // 20)
        host = _audible(min(host, self._own_host(after, all_books)), max(GROWTH_BYTES, noise)) if known else 0
        host = max(host, _audible(array_bytes, NOISE_BYTES))
        device = _audible(min(device, self._own_device(after, all_books)), noise)
        if released:  # what this process keeps for itself is no engine's any more
            host = device = 0
        own = ProcessMemory(after.own.pid, after.own.started_s, after.own.command, host if known else None, device)
        return self._sum(after, model, [own] if known else None)

    def _sum(self, after: MemorySample, model: str, own: list[ProcessMemory] | None) -> OutsideMemory:
        if own is None or after.children is None:
            return OutsideMemory()
        children = [child for child in after.children if self._owners.get((child.pid, child.started_s)) == model]
        if sum(map(_size, children)) < NOISE_BYTES:
            children = []
        holders = tuple(holder for holder in [*own, *children] if _size(holder))
        unknown = after.own.device_bytes is None and self.separate_memory
        return OutsideMemory(holders, known=not unknown)

    def _own_host(self, after: MemorySample, all_books: tuple[int, int]) -> int:
        assert self._base is not None, "a move that has ended had begun"
        before, books = self._base
        grown = _difference(after.own.host_bytes, before.own.host_bytes)
        libraries = MODULE_BYTES * max(0, after.modules - before.modules) + CONTEXT_BYTES * self.cuda
        return grown - (self._in_main(all_books) - books) - libraries

    def _own_device(self, after: MemorySample, all_books: tuple[int, int]) -> int:
        return (after.own.device_bytes or 0) - all_books[0] - CONTEXT_BYTES * self.cuda

    def _in_main(self, books: tuple[int, int]) -> int:
        """What of the books lies in main memory: a device without memory of its own has its bytes there too."""
        device_bytes, host_bytes = books
        return host_bytes if self.separate_memory else host_bytes + device_bytes


def _difference(after: int | None, before: int | None) -> int:
    return (after or 0) - (before or 0)


def _audible(nbytes: int, noise_bytes: int) -> int:
    return nbytes if nbytes >= noise_bytes else 0


def _size(holder: ProcessMemory) -> int:
    return (holder.host_bytes or 0) + (holder.device_bytes or 0)
