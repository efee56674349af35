"""The types of `status()` and `history()`, also used for the OpenAPI description.

Sizes are in bytes and times in seconds; None (null in JSON) is unknown. Results are plain dictionaries and are not
validated at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from typing_extensions import TypedDict  # pydantic refuses typing.TypedDict before Python 3.12

from .states import Place, ShownState

MoveOutcome = Literal["ok", "failed", "postponed"]


@dataclass(frozen=True)
class Doc:
    """The description of a field in `Annotated`. Pydantic reads it; this module does not import pydantic."""

    text: str

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, object]:
        return {**handler(core_schema), "description": self.text}


class MemorySizes(TypedDict):
    """The memory of the device or of the host."""

    total_bytes: Annotated[int | None, Doc("Its size in bytes; null if unknown.")]
    free_bytes: Annotated[int | None, Doc("Free bytes; null if unknown.")]
    process_bytes: Annotated[int | None, Doc("Bytes that this process uses; null if unknown.")]
    outside_bytes: Annotated[int | None, Doc("Bytes that the models use and no move frees; null if unknown.")]


class Note(TypedDict):
    """A note about the device."""

    en: Annotated[str, Doc("In English.")]
    zh: Annotated[str, Doc("In Chinese.")]


class DeviceStatus(MemorySizes):
    """The device on which the models compute."""

    name: Annotated[str, Doc("Its name.")]
    kind: Annotated[Literal["cuda", "cpu", "simulated"], Doc("Its kind.")]
    peers_bytes: Annotated[int | None, Doc("Bytes that other processes of this project use; null if unknown.")]
    power_w: Annotated[float | None, Doc("Power draw in watts; null if unknown.")]
    energy_wh: Annotated[float | None, Doc("Watt-hours drawn since the app found it; null if unknown.")]
    budget_bytes: Annotated[int | None, Doc("Bytes that all models together may use; null if not limited.")]
    note: Annotated[Note | None, Doc("What users should know about it; null if nothing.")]


class MonitorHealth(TypedDict):
    """The thread that moves idle models."""

    alive: Annotated[bool, Doc("Whether it runs; it starts with the first request.")]
    errors: Annotated[int, Doc("Errors since the start.")]
    last_error: Annotated[str | None, Doc("The last of them; null if none.")]


class HolderStatus(TypedDict):
    """The code that uses a model."""

    where: Annotated[str, Doc("File, line and function that took the lease.")]
    thread: Annotated[str, Doc("The name of its thread.")]
    held_s: Annotated[float, Doc("Seconds since it got the model.")]
    waits_for: Annotated[str | None, Doc("The thread that it waits for and that waits for this model; null if none.")]


class NextMove(TypedDict):
    """The move that the policy makes if no request comes."""

    to: Annotated[Place, Doc("Where the model will be.")]
    in_s: Annotated[float, Doc("Seconds until then.")]


class MoveProgress(TypedDict):
    """The move that runs."""

    to: Annotated[Place, Doc("Where the model will be.")]
    phase: Annotated[str, Doc("The step of the move: loading, copying, reading, ...")]
    bytes: Annotated[int, Doc("Bytes done in this phase.")]
    total_bytes: Annotated[int | None, Doc("All bytes of this phase; null if unknown.")]
    seconds: Annotated[float, Doc("Seconds since the move began.")]
    bytes_per_s: Annotated[int | None, Doc("The rate of this phase, in bytes per second; null if unknown.")]


# "from" is a keyword of Python, so it needs the call syntax.
_Route = TypedDict("_Route", {"from": Annotated[Place, Doc("Where the model was.")],
                              "to": Annotated[Place, Doc("Where the move led.")]})  # fmt: skip


class LastMove(_Route):
    """A move that has ended."""

    bytes: Annotated[int, Doc("Bytes moved.")]
    seconds: Annotated[float, Doc("How long it took, in seconds.")]


class OutsideProcess(TypedDict):
    """A process that uses memory which belongs to a model and which no move frees."""

    pid: Annotated[int, Doc("Its process ID.")]
    command: Annotated[str, Doc("Its command.")]
    device_bytes: Annotated[int | None, Doc("Bytes that it uses on the device; null if unknown.")]
    host_bytes: Annotated[int | None, Doc("Bytes that it uses in main memory; null if unknown.")]


class LastOffload(TypedDict):
    """How the model of a worker process left the device."""

    way: Annotated[
        Literal["weights", "weights+checkpoint", "checkpoint"],
        Doc(
            "What left: the weights; also the rest of the process, by a checkpoint of the driver; or all by the latter."
        ),
    ]
    bytes: Annotated[int, Doc("Bytes of the model that left.")]
    checkpoint_bytes: Annotated[
        int | None, Doc("Bytes that the checkpoint took off the device; 0 without one; null if unknown.")
    ]
    seconds: Annotated[float, Doc("How long it took, in seconds.")]


class WorkerStatus(TypedDict):
    """The worker process of a model, with its child processes."""

    pid: Annotated[int, Doc("Its process ID.")]
    device_bytes: Annotated[int | None, Doc("Bytes that it holds on the device, by the driver; null if unknown.")]
    host_bytes: Annotated[int | None, Doc("Bytes of main memory that end with it; null if unknown.")]
    context_bytes: Annotated[
        int | None, Doc("Bytes on the device beyond the model: CUDA context and workspaces; null if unknown.")
    ]
    checkpointed: Annotated[bool, Doc("Whether the driver has moved what it held on the device to main memory.")]
    last_offload: Annotated[LastOffload | None, Doc("Its last offload; null before the first.")]


class LastWait(TypedDict):
    """How long a request waited for the model, and why."""

    waited_s: Annotated[float, Doc("Seconds from its arrival until it had the model.")]
    queue_s: Annotated[float, Doc("Of these: for requests before it, room on the device, and offloads.")]
    move: Annotated[Literal["load", "restore"] | None, Doc("How the model came; null if it was there.")]
    move_s: Annotated[float, Doc("Seconds of the wait in which it was loaded or restored.")]


class ModelStatus(TypedDict):
    """One model."""

    state: Annotated[ShownState, Doc("Where it is; `moving` while a move runs.")]
    device_bytes: Annotated[int, Doc("Bytes on the device, as of the last move that ended.")]
    host_bytes: Annotated[int, Doc("Bytes in main memory, as of the last move that ended.")]
    size_bytes: Annotated[int, Doc("Bytes that it used on the device when it was last there; 0 before that.")]
    idle_s: Annotated[float | None, Doc("Seconds since its last request ended, 0 during one; null before the first.")]
    leases: Annotated[int, Doc("1 while a request uses it, else 0.")]
    holder: Annotated[HolderStatus | None, Doc("The code that uses it; null if none.")]
    waiting: Annotated[int, Doc("Requests that wait for it.")]
    keep_warm_s: Annotated[float, Doc("Seconds on the device after a request; -1: always.")]
    keep_warm_by: Annotated[
        Literal["policy", "request"], Doc("`request`: the last request said so, for the time until the next one.")
    ]
    idle_timeout_s: Annotated[float, Doc("Seconds idle until it is released; -1: never.")]
    policy: Annotated[str, Doc("`fixed`, `auto`, or the name of a policy given to `register`.")]
    pending: Annotated[
        Literal["offload", "release"] | None, Doc("What follows the running request or move; null if nothing.")
    ]
    next: Annotated[NextMove | None, Doc("The move that follows if no request comes; null if none.")]
    progress: Annotated[MoveProgress | None, Doc("The move that runs; null if none.")]
    last_move: Annotated[LastMove | None, Doc("The last move that succeeded; null before the first.")]
    last_wait: Annotated[LastWait | None, Doc("How long the last request waited; null before the first.")]
    last_error: Annotated[str | None, Doc("Why its last move failed; null if it did not.")]
    outside_bytes: Annotated[int | None, Doc("Bytes that it uses and no move frees; null if unknown.")]
    outside_processes: Annotated[list[OutsideProcess], Doc("The processes that use those bytes.")]
    worker: Annotated[WorkerStatus | None, Doc("Its worker process; null without one.")]
    kept_bytes: Annotated[
        int | None,
        Doc("Bytes of its offloaded weights that outlive its worker process; null if its loader does not take them."),
    ]


class YieldStatus(TypedDict):
    """Models that left the device for another process."""

    ago_s: Annotated[float, Doc("Seconds since then.")]
    pid: Annotated[int | None, Doc("The process that had grown; null if unknown.")]
    name: Annotated[str, Doc("Its name; empty if unknown.")]
    bytes: Annotated[int, Doc("Bytes that they used on the device.")]
    models: Annotated[list[str], Doc("Their names.")]


class QueuedMove(TypedDict):
    """A move of a process of this project that waits for room or runs, or another process that needs memory."""

    model: Annotated[str, Doc("Its model; empty for a process outside of this project.")]
    pid: Annotated[int, Doc("Its process, as that process names itself.")]
    wanted_bytes: Annotated[int, Doc("Bytes that it needs; 0 if unknown.")]
    waited_s: Annotated[float, Doc("Seconds since its request arrived.")]
    claimed: Annotated[bool, Doc("It has its room, and runs.")]


class NeighborStatus(TypedDict):
    """Another GPU server on this machine, as it was when it was last looked at."""

    kind: Annotated[str, Doc("Its kind, as in --gpu-neighbor.")]
    url: Annotated[str, Doc("Its address.")]
    pid: Annotated[int | None, Doc("Its process on the device; null if it was given by address.")]
    in_use: Annotated[bool | None, Doc("It had requests; null before the first look.")]
    idle_bytes: Annotated[int | None, Doc("Bytes that it would give up; null if it does not say.")]
    models: Annotated[list[str], Doc("The models that it held, if it says so.")]
    asked_ago_s: Annotated[float | None, Doc("Seconds since it was asked for memory; null before the first time.")]
    answer: Annotated[str | None, Doc("Why it could not be asked; null if it could.")]


class HoldingProcess(TypedDict):
    """Another process that holds memory of the device, by the driver."""

    pid: Annotated[int, Doc("Its number.")]
    name: Annotated[str, Doc("Its name; ? if it cannot be read.")]
    bytes: Annotated[int | None, Doc("Bytes that it holds; null if unknown.")]


class SharingStatus(TypedDict):
    """The device as shared with other processes."""

    headroom_bytes: Annotated[int, Doc("When less is free, idle models leave; 0: they do not.")]
    yields: Annotated[int, Doc("How often models left for other processes.")]
    last_yield: Annotated[YieldStatus | None, Doc("The last time; null before the first.")]
    peers: Annotated[
        list[int],
        Doc("Pids of other apps of this project that use the device, each as in its container: two may be equal."),
    ]
    holders: Annotated[list[HoldingProcess], Doc("Other processes that hold memory of the device.")]
    neighbors: Annotated[list[NeighborStatus], Doc("Servers that are asked for memory; see --gpu-neighbor.")]
    queue: Annotated[list[QueuedMove], Doc("Moves that wait for room, in order of arrival, and those that run.")]


class Status(TypedDict):
    """The device, main memory and the models."""

    enabled: Annotated[Literal[True], Doc("GPU management is on.")]
    isolation: Annotated[
        Literal["none", "process"], Doc("`process`: each loaded model has a worker process, which its release ends.")
    ]
    device: Annotated[DeviceStatus, Doc("The device.")]
    host: Annotated[MemorySizes, Doc("Main memory.")]
    monitor: Annotated[MonitorHealth, Doc("Whether idle models are moved.")]
    sharing: Annotated[SharingStatus | None, Doc("How the device is shared; null if it is not.")]
    models: Annotated[dict[str, ModelStatus], Doc("The models by name, in order of registration.")]


class ListedMove(LastMove):
    """One of the last moves of a model."""

    ago_s: Annotated[float, Doc("Seconds since it ended.")]
    outcome: Annotated[MoveOutcome, Doc("`postponed`: it waits for room on the device.")]


class MoveCount(_Route):
    """How many moves of one kind have ended."""

    outcome: Annotated[MoveOutcome, Doc("How they ended.")]
    count: Annotated[int, Doc("How many.")]


class HistogramCounts(TypedDict):
    """Durations, counted as in a Prometheus histogram."""

    buckets: Annotated[list[list[str | int]], Doc("[upper bound in seconds, durations up to it]; the last is `+Inf`.")]
    sum: Annotated[float, Doc("All durations together, in seconds.")]


class Totals(TypedDict):
    """Counts since the start."""

    requests: Annotated[dict[str, int], Doc("Requests that have ended, by outcome.")]
    request_wait_seconds: Annotated[HistogramCounts, Doc("How long requests waited for the model.")]
    moves: Annotated[list[MoveCount], Doc("Moves that have ended.")]
    move_seconds: Annotated[HistogramCounts, Doc("How long moves took.")]
    given_back_byte_hours: Annotated[
        float | None,
        Doc("Since its first load: the model's size minus its bytes on the device, times hours; null for the CPU."),
    ]


class ModelUsage(TypedDict):
    """What one model did."""

    device_bytes: Annotated[list[list[float]], Doc("[seconds ago, bytes from then on] on the device, oldest first.")]
    requests: Annotated[list[list[float]], Doc("[begin, end] of requests in seconds ago, the oldest first.")]
    moves: Annotated[list[ListedMove], Doc("The last moves, the oldest first.")]
    totals: Annotated[Totals, Doc("How many requests and moves have ended, and how long they took.")]


class DeviceUsage(TypedDict):
    """The memory of the device, as used by all processes."""

    used_bytes: Annotated[list[list[float]], Doc("[seconds ago, bytes used from then on], the oldest first.")]
    total_bytes: Annotated[int | None, Doc("Its size in bytes; null if unknown.")]


class UsageHistory(TypedDict):
    """The last 15 minutes, and counts since the start."""

    window_s: Annotated[float, Doc("How many seconds sizes and requests go back.")]
    device: Annotated[DeviceUsage, Doc("The device.")]
    models: Annotated[dict[str, ModelUsage], Doc("The models by name, in order of registration.")]
