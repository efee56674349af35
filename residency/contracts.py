"""Protocols between the parts. Types only.

A `Device` or `Clock` may be called from any thread at any time.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

DeviceKind = Literal["cuda", "cpu", "simulated"]
Time = float | str | None
"""A duration: seconds or ``"15m"``; -1: no limit; None: the default. See `residency.scheduling.policies.seconds`."""


@dataclass(frozen=True)
class Memory:
    """Sizes in bytes; None where unknown. ``process_bytes`` is this process's share."""

    total_bytes: int | None = None
    free_bytes: int | None = None
    process_bytes: int | None = None


@dataclass(frozen=True)
class Telemetry:
    """Data from the card's driver; None where unknown.

    ``peers_bytes``: memory used by other processes of this project. ``power_w``: current power draw in watts.
    ``energy_wh``: watt-hours that the card has drawn since this process found it.
    """

    peers_bytes: int | None = None
    power_w: float | None = None
    energy_wh: float | None = None


class Device(Protocol):
    """The device on which models compute; accounts for their memory.

    Methods that return nothing have no effect unless a device overrides them.
    """

    kind: DeviceKind
    name: str
    """Display name; a `Sentence` if it depends on the language."""
    torch_device: str
    """The device string for ``torch``: ``"cuda"`` or ``"cpu"``."""
    separate: bool
    """False if device and host share their memory; then an offload moves nothing."""
    note: dict[str, str] | None
    """A note for users by language (``en``, ``zh``), or None."""
    identity: str = "cpu"
    """A name that all processes on this machine, also in containers, have for this device, and for no other one."""

    def memory(self) -> Memory:
        """Returns the current sizes. Never raises, never creates a CUDA context."""

    def held_by(self) -> Mapping[int, int] | None:
        """Returns the bytes of its memory by process, without torch's cache; None where unknown. Never raises."""

    def holders(self) -> Sequence[tuple[int, int | None]]:
        """Returns the processes that hold memory of it: (pid, bytes or None if unknown). Never raises."""

    def bytes_of(self, pids: Collection[int]) -> int | None:
        """Returns the bytes of its memory that other processes hold together; None where unknown. Never raises."""
        return None

    def worker_bytes(self, host_bytes: Mapping[int, int], awake: bool) -> tuple[int, int] | None:
        """Returns (device, host) bytes of worker processes, given the private main memory of each by pid.

        ``awake``: their engine has not been offloaded. None where unknown. Never raises.
        """

    def telemetry(self) -> Telemetry:
        """Returns further data of the driver. Never raises, never creates a CUDA context."""

    def ensure_usable(self) -> None:
        """Checks, before a first load, that torch can compute here; raises `DeviceUnavailable` if not."""
        return

    def is_usable(self) -> bool:
        """Tests the device itself for this process.

        False only after a permanent failure: a device that is full, busy, or not in use yet is usable. Takes up to some
        seconds, needs no device memory, does not disturb other work on it, and never raises.
        """

    def holds_tensor(self, tensor: torch.Tensor) -> bool:
        """Returns whether a tensor's bytes are on this device and move at an offload; raises `OnAnotherDevice`."""

    def holds_session(self, providers: Sequence[str]) -> bool:
        """Returns whether an ONNX Runtime session with these execution providers uses memory of the device."""

    def charge(self, nbytes: int) -> None:
        """Adds bytes that a loader placed here; raises `DeviceOutOfMemory` if they exceed the device."""
        return

    def refund(self, nbytes: int) -> None:
        """Subtracts bytes that were freed without `drop` (a destroyed session, a released engine)."""
        return

    def allocate(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        """Reallocates ``nbytes`` for an empty storage, uninitialised; raises `DeviceOutOfMemory` if they do not fit."""
        return

    def drop(self, storage: torch.UntypedStorage) -> None:
        """Frees the bytes of a storage; its tensors remain, empty."""
        return

    def placing(self) -> AbstractContextManager[Any]:
        """Returns a context for calls of `allocate`.

        Its value is the memory pool, which must be kept as long as the allocated memory is in use.
        """

    def transfer(self) -> AbstractContextManager[Any]:
        """Returns a context for copies to or from the device and computation there; they are complete when it ends."""

    def pin(self, raw: torch.Tensor) -> bool:
        """Page-locks main memory (uint8, page-aligned) for fast copies; returns False if refused, which is no error."""

    def unpin(self, raw: torch.Tensor) -> None:
        """Unlocks memory locked by `pin`."""
        return

    def wait(self) -> None:
        """Waits for all running work of this device; afterwards nothing reads or writes an unused model."""
        return

    def settle(self) -> None:
        """Returns freed memory to the driver."""
        return


class ProcessCheckpoints(Protocol):
    """Checkpoints of worker processes by the driver: moves what a process holds on the device to main memory, and back.

    Thread-safe for different processes.
    """

    def unavailable(self) -> str | None:
        """Returns why there are no checkpoints, and what to do (a `Sentence`); None if they are available."""

    def checkpoint(self, pid: int, timeout_s: float) -> None:
        """Removes all memory of a process from the device.

        Raises `CheckpointFailed`: then the process runs as before, or its `state` is another one and it must be ended.
        """

    def restore(self, pid: int, timeout_s: float) -> None:
        """Restores the memory of a checkpointed process, which runs as before.

        Raises `CheckpointFailed`: then it is still checkpointed (the device may be full), or must be ended.
        """

    def state(self, pid: int) -> Literal["running", "locked", "checkpointed", "failed", "gone"]:
        """Returns the state of a process; ``gone`` once it has ended."""

    def close(self) -> None: ...


class WorkerState(Protocol):
    """A worker process, for the status. Any thread may read it at any time."""

    @property
    def pid(self) -> int: ...

    @property
    def ended(self) -> bool: ...

    @property
    def checkpointed(self) -> bool: ...

    @property
    def modules(self) -> int:
        """Modules imported by it alone, whose memory is not unmanaged memory."""

    @property
    def context_bytes(self) -> int:
        """Bytes that it held on the device before its load; 0 if unknown."""


@runtime_checkable
class InWorker(Protocol):
    """A `memory.Resident` of an engine in a worker process: what the status reads of it."""

    @property
    def worker(self) -> WorkerState: ...

    @property
    def last_offload(self) -> Any:
        """Way, bytes, checkpointed bytes and seconds (fields of `LastOffload` in the status); None before the first."""

    @property
    def kept_bytes(self) -> int | None:
        """Bytes of weights in main memory that outlive the worker; None if its loader does not take them."""

    def leave_device(self) -> None:
        """Ends the worker of an offloaded model if its weights outlive it, for room on the device. Any thread."""


class Engine(Protocol):
    """A speech engine with the two methods of StepAudioTTS.

    Optional: ``check_text(target_text)`` and ``check_audio(path)`` raise `InvalidInput` for a text that the engine
    cannot speak, and for a recording that it cannot take. They are called from any thread, before the model is loaded,
    and must return at once and load nothing.

    Both methods return ``(audio, sample_rate)``: float32 of shape [1, samples] on the CPU, and Hz.
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
    """Decides when an idle model is on the device, and when it leaves main memory. Pure: gets all times as arguments.

    All times are seconds after the end of the last lease; ``math.inf`` is never. Calls come one at a time, under the
    manager's lock, and must return at once. Results may change only in `idle_ended` and `brought_back`. One object
    serves one model.
    """

    @property
    def name(self) -> str:
        """``fixed``, ``auto``, or the status name of a custom policy."""

    @property
    def keep_warm_s(self) -> float:
        """The time that the model currently stays on the device."""

    @property
    def idle_timeout_s(self) -> float:
        """The time of its release; postponed while it is within `windows`."""

    def windows(self) -> tuple[tuple[float, float], ...]:
        """Returns when an idle model is on the device: (from, until), in order, not overlapping. The first begins at 0.

        Each later window restores the model before an expected request.
        """

    def idle_ended(self, idle_s: float) -> None:
        """Called when a request arrives after ``idle_s`` idle seconds (prefetches do not count)."""

    def brought_back(self, seconds: float) -> None:
        """Called after a restore that took ``seconds``."""

    def with_idle_timeout(self, idle_timeout_s: float) -> Policy:
        """Returns the same policy with another idle timeout; keeps what it has learned."""


class Clock(Protocol):
    """Monotonic time in seconds, and waits with a deadline."""

    def now(self) -> float: ...

    def wait(self, event: threading.Lock, timeout_s: float = ...) -> None:
        """Waits until a one-shot event (`residency.locks`) is set, or for ``timeout_s`` (may be `math.inf`).

        May return early: the caller checks its condition again, and waits with a new event.
        """
