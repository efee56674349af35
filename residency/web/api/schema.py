"""What the HTTP calls take and answer, for their description at ``/docs``. Sizes in bytes, times in seconds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

Name = Literal["gpu", "cpu", "released", "moving"]
Settled = Literal["gpu", "cpu", "released"]
Seconds = float


def _duration(words: str) -> WithJsonSchema:
    """Checked by the manager, which says what is wrong better than a schema can."""
    digits = r"([0-9]{1,8}(\.[0-9]+)?s?|[0-9]{1,6}(\.[0-9]+)?m|[0-9]{1,5}(\.[0-9]+)?h"
    text = {"type": "string", "pattern": rf"^{digits}|-1{words})$"}
    number = {"type": "number", "minimum": 0, "maximum": 360_000_000}
    return WithJsonSchema({"anyOf": [number, {"const": -1}, text]})


Duration = Annotated[float | str, _duration("")]
DurationOrAuto = Annotated[float | str, _duration("|auto")]


class Which(BaseModel):
    """``model`` left out or null is all models."""

    model_config = ConfigDict(extra="forbid", title="Which")
    model: str | None = Field(None, examples=["tts"])


class Configuration(Which):
    """Seconds or ``90s``, ``15m``, ``1h``; -1 is never; ``keep_warm`` may be ``auto``. What is left out stays."""

    model_config = ConfigDict(extra="forbid", title="Configuration", allow_inf_nan=False)
    keep_warm: DurationOrAuto | None = Field(None, examples=["30s", "auto"])
    idle_timeout: Duration | None = Field(None, examples=["10m"])


class Health(BaseModel):
    status: Literal["ok"]


class Refusal(BaseModel):
    """Why not, and what to do next, in English and Chinese."""

    error: str
    known: list[str] | None = Field(None, description="The models that there are, where none is called so.")


class Memory(BaseModel):
    total_bytes: int | None
    free_bytes: int | None
    process_bytes: int | None = Field(description="What this process holds of it.")
    outside_bytes: int | None = Field(description="What the models hold of it beyond the books.")


class Note(BaseModel):
    en: str
    zh: str


class Device(Memory):
    name: str
    kind: Literal["cuda", "cpu", "simulated"]
    peers_bytes: int | None = Field(description="What other processes of this project hold of it.")
    power_w: float | None = Field(description="What the card draws, in watts.")
    budget_bytes: int | None = Field(description="What the models together may take of it.")
    note: Note | None


class Move(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    source: Settled = Field(alias="from")
    to: Settled
    bytes: int
    seconds: Seconds


class Next(BaseModel):
    to: Settled
    in_s: Seconds


class Progress(BaseModel):
    to: Settled
    phase: str
    bytes: int
    total_bytes: int | None
    seconds: Seconds
    bytes_per_s: int | None


class Holder(BaseModel):
    where: str = Field(description="File, line and function that took the lease.")
    thread: str
    held_s: Seconds
    waits_for: str | None = Field(description="The thread that it waits for and that waits for this model.")


class OutsideProcess(BaseModel):
    """A process that holds memory which the books do not know."""

    pid: int
    command: str
    device_bytes: int | None
    host_bytes: int | None


class Model(BaseModel):
    state: Name
    device_bytes: int
    host_bytes: int
    size_bytes: int = Field(description="What it took on the device when it was last there; 0 before that.")
    idle_s: Seconds | None
    leases: int = Field(description="1 while a request uses it.")
    holder: Holder | None = Field(description="The request that uses it.")
    waiting: int = Field(description="Requests that wait for it.")
    keep_warm_s: Seconds = Field(description="-1: for ever.")
    idle_timeout_s: Seconds = Field(description="-1: never.")
    policy: str
    pending: Literal["offload", "release"] | None = Field(description="What was asked for and will follow.")
    next: Next | None
    progress: Progress | None
    last_move: Move | None
    last_error: str | None
    outside_bytes: int | None = Field(description="Held by the process and its children beyond the books.")
    outside_processes: list[OutsideProcess]


class Monitor(BaseModel):
    alive: bool
    errors: int
    last_error: str | None


class Status(BaseModel):
    enabled: Literal[True]
    device: Device
    host: Memory
    monitor: Monitor
    models: dict[str, Model]


class Event(BaseModel):
    """One thing that happened to one model; ``queue`` tells of who waits for it, the others of a move."""

    what: Literal["began", "progress", "done", "failed", "queue"]
    model: str
    source: Name = Field(description="Where the move began; without a move, where the model is.")
    target: Name = Field(description="Where it leads; without a move, the same.")
    time_s: Seconds = Field(description="By a clock of the app's own: only differences mean something.")
    waiting: int = Field(description="Requests that wait for the model.")
    seconds: Seconds = Field(description="Since the move began.")
    phase: str = Field(description="What is being done: loading, copying, reading, ...; empty without a move.")
    done_bytes: int = Field(description="Of this phase.")
    total_bytes: int | None = Field(description="Of this phase.")
    bytes_per_s: float | None
    error: str | None = Field(description="Why it has failed.")


class PastMove(Move):
    ago_s: Seconds
    outcome: Literal["ok", "failed", "postponed"]


class Histogram(BaseModel):
    buckets: list[tuple[str, int]] = Field(description="Upper bound, and how many up to it.")
    sum: Seconds


class CountedMoves(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    source: Settled = Field(alias="from")
    to: Settled
    outcome: str
    count: int


class Totals(BaseModel):
    requests: dict[str, int] = Field(description="By outcome.")
    request_wait_seconds: Histogram
    moves: list[CountedMoves]
    move_seconds: Histogram


class ModelHistory(BaseModel):
    device_bytes: list[tuple[Seconds, int]] = Field(description="Seconds ago, and what it held from then on.")
    requests: list[tuple[Seconds, Seconds]] = Field(description="Seconds ago: from, to.")
    moves: list[PastMove]
    totals: Totals


class CardHistory(BaseModel):
    used_bytes: list[tuple[Seconds, int]] = Field(description="Seconds ago, and what all together used from then on.")
    total_bytes: int | None


class History(BaseModel):
    window_s: Seconds
    device: CardHistory
    models: dict[str, ModelHistory]
