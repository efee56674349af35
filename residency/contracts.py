"""What the parts promise each other. Types only: nothing here does work.

Thread rules: the manager calls a `Resident` from one thread at a time and never while a lease is held.
A `Device` or `Clock` may be called from any thread at any time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

DeviceKind = Literal["cuda", "cpu", "simulated"]


@dataclass(frozen=True)
class Memory:
    """Sizes in bytes; None where unknown. ``process_bytes`` is what this process holds of it."""

    total_bytes: int | None = None
    free_bytes: int | None = None
    process_bytes: int | None = None


@dataclass(frozen=True)
class Telemetry:
    """Facts from the card's driver; None where unknown.

    ``peers_bytes`` is what other processes of this project hold of its memory, ``power_w`` what it draws now, in watts.
    """

    peers_bytes: int | None = None
    power_w: float | None = None


class Device(Protocol):
    """Where models compute. Accounts for the memory of the models there."""

    kind: DeviceKind
    name: str
    """What people call it; a `Sentence` where that depends on the language."""
    torch_device: str
    """What engines pass to ``torch`` to place tensors: ``"cuda"`` or ``"cpu"``."""
    separate: bool
    """False where device and host are the same memory: then offload saves nothing and moves nothing."""
    note: dict[str, str] | None
    """What people must know about this device, by language (``en``, ``zh``); None if nothing."""

    def memory(self) -> Memory:
        """Current sizes. Never raises, never creates a CUDA context."""

    def held_by(self) -> Mapping[int, int] | None:
        """Bytes of its memory by process, without what torch keeps for reuse; None where unknown. Never raises."""

    def telemetry(self) -> Telemetry:
        """What the driver tells beside the sizes. Never raises, never creates a CUDA context."""

    def ensure_usable(self) -> None:
        """Check, before a first load, that torch can compute here; `DeviceUnavailable` if not."""

    def is_usable(self) -> bool:
        """Whether the device still answers this process, asked of the device itself.

        False only if it is gone for good: a device that is full, busy, or not in use yet is usable. Takes seconds at
        most, needs no memory of the device, does not disturb other work on it, and never raises.
        """

    def holds_tensor(self, tensor: torch.Tensor) -> bool:
        """Whether this tensor's bytes lie on the device and leave it at an offload; or `OnAnotherDevice`."""

    def holds_session(self, providers: Sequence[str]) -> bool:
        """Whether an ONNX Runtime session with these execution providers takes memory of the device."""

    def charge(self, nbytes: int) -> None:
        """Account for bytes that a loader has placed here; `DeviceOutOfMemory` if they exceed the device."""

    def refund(self, nbytes: int) -> None:
        """Account for bytes that left without `drop` (a destroyed session, a released engine)."""

    def allocate(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        """Give an empty storage its ``nbytes`` back, uninitialised; `DeviceOutOfMemory` if they do not fit."""

    def drop(self, storage: torch.UntypedStorage) -> None:
        """Free the bytes of a storage; its tensors stay, empty."""

    def placing(self) -> AbstractContextManager[Any]:
        """A block of calls of `allocate`.

        Gives an object to keep for as long as what was allocated in the block is in use: its pool of memory.
        """

    def transfer(self) -> AbstractContextManager[Any]:
        """A block of copies to or from the device and of computing there, complete when it ends."""

    def pin(self, raw: torch.Tensor) -> bool:
        """Lock pages of main memory (uint8, page-aligned) for fast copies; False if refused, which is no error."""

    def unpin(self, raw: torch.Tensor) -> None:
        """Unlock what `pin` has locked."""

    def wait(self) -> None:
        """Wait for all work under way on this device: then nothing reads or writes a model that nobody uses."""

    def settle(self) -> None:
        """Hand freed memory back to the driver."""


class Resident(Protocol):
    """The part of a model that can live on the device, on the host, or nowhere.

    Moves are all or nothing and idempotent: on an error everything is where it was before the call.
    """

    @property
    def device_bytes(self) -> int:
        """Bytes on the device now."""

    @property
    def host_bytes(self) -> int:
        """Bytes in main memory now."""

    def offload(self) -> int:
        """Leave the device for the host; return the bytes moved."""

    def restore(self) -> int:
        """Come back to the device; return the bytes moved."""

    def release(self) -> int:
        """Give up both places; return the bytes freed. Never raises; the engine is unusable afterwards."""

    def save(self, store: SnapshotStore, name: str) -> int:
        """Give up both places for a snapshot, and return the bytes freed; the engine stays as a skeleton.

        `SnapshotUnusable` if there cannot be one; then everything is on device or host.
        """

    def load(self, store: SnapshotStore, name: str) -> int:
        """Come back to the host from a snapshot, and return the bytes read.

        `SnapshotUnusable` if it is gone or bad; then only `release` is left.
        """


class Loan(Resident, Protocol):
    """A kept part as one engine has it. Once another has borrowed it, this moves nothing any more and holds nothing."""

    def joined_with(self, engine: Resident) -> Resident:
        """The engine and what it has borrowed, as one."""


class KeptPart(Protocol):
    """A part that a loader is given and does not build: it outlives releases, on the host, and is its owner's."""

    lock: threading.Lock
    """Protects each move of the part: a load that was given up may end beside the next one."""

    @property
    def device_bytes(self) -> int: ...

    @property
    def host_bytes(self) -> int: ...

    def offload(self) -> int:
        """Leave the device, before anybody has borrowed it."""

    def borrow_locked(self) -> Loan:
        """Lend it to a load; the loan before ends."""

    def hand_back(self) -> None:
        """Come back to the device, as it was given, and be taken care of no more. On an error nothing has changed."""


class SnapshotStore(Protocol):
    """Keeps bytes on disk between a release and the next load. Thread-safe for different names."""

    def write(self, name: str, ranges: Sequence[tuple[int, int]], hashes: Sequence[int], raw: torch.Tensor) -> None:
        """Keep ``raw`` (uint8), whose ``ranges`` (start, stop) have these XXH3 hashes; or `SnapshotUnusable`."""

    def read(
        self, name: str, ranges: Sequence[tuple[int, int]], hashes: Sequence[int], raw: torch.Tensor, *, once: bool
    ) -> None:
        """Fill ``raw`` with what was written under that name and these hashes; `SnapshotUnusable` if it cannot be.

        With ``once`` it is not kept any longer: it will not be written in this form again.
        """


class Adoption(Protocol):
    """What is known of a model before its engine is searched for memory."""

    @property
    def skip(self) -> tuple[str, ...]:
        """Paths in the engine; objects below them are left alone."""

    @property
    def borrowed_part(self) -> KeptPart | None:
        """A part of the engine that outlives a release, and is searched by itself."""


class Adopt(Protocol):
    """Finds the parts of a fresh engine that hold memory, except for ``borrowed_part``."""

    def __call__(self, engine: Any, device: Device, managed: Adoption) -> Resident: ...


class Engine(Protocol):
    """A speech engine with the two methods of StepAudioTTS.

    It may have a third, ``check_text(target_text)``: raises `InvalidInput` for a text that it cannot say. It answers at
    once, in any thread, and loads nothing, so that nobody waits for a model to hear that.

    Both return ``(audio, sample_rate)``: float32 of shape [1, samples] on the CPU, and Hz.
    """

    def clone(self, prompt_wav_path: str, prompt_text: str, target_text: str) -> tuple[torch.Tensor, int]: ...

    def edit(
        self,
        input_audio_path: str,
        audio_text: str,
        edit_type: str,
        edit_info: str | None = None,
        text: str | None = None,
    ) -> tuple[torch.Tensor, int]: ...


@runtime_checkable
class Policy(Protocol):
    """When an idle model is on the device, and when it leaves main memory. Pure: is fed with times, asks no clock.

    All times are seconds after the end of the last lease; ``math.inf`` is never. Calls come one at a time, under the
    manager's lock, and answer at once; what the others answer may change in `idle_ended` and `brought_back` only.
    One object serves one model.
    """

    @property
    def name(self) -> str:
        """``fixed``, ``auto``, or what a policy of one's own is called in the status."""

    @property
    def keep_warm_s(self) -> float:
        """How long the model stays on the device now."""

    @property
    def idle_timeout_s(self) -> float:
        """When it is released; not while `windows` promises that it is on the device."""

    def windows(self) -> tuple[tuple[float, float], ...]:
        """When an idle model is on the device: (from, until), in order and apart. The first begins at 0.

        A later one brings the model back before the request that is expected in it.
        """

    def idle_ended(self, idle_s: float) -> None:
        """A request came after the model had been idle for ``idle_s`` (prefetches do not count)."""

    def brought_back(self, seconds: float) -> None:
        """A restore has taken this long."""

    def with_idle_timeout(self, idle_timeout_s: float) -> Policy:
        """The same policy with another idle timeout; it keeps what it has learned."""


class Clock(Protocol):
    """Monotonic time in seconds, and waiting until a deadline."""

    def now(self) -> float: ...

    def wait(self, event: threading.Lock, timeout_s: float = ...) -> None:
        """Wait until a one-shot event (see `residency.one_shot_event`) is set, or for ``timeout_s`` (`math.inf`).

        May return early: the caller checks its condition again, and waits with a new event.
        """
