"""Models of HTTP request bodies, and of the responses that are not in `residency.status_types`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema


def _duration(words: str) -> WithJsonSchema:
    """Returns the JSON schema of a duration. The manager validates durations, with better messages."""
    digits = r"([0-9]{1,8}(\.[0-9]+)?s?|[0-9]{1,6}(\.[0-9]+)?m|[0-9]{1,5}(\.[0-9]+)?h"
    text = {"type": "string", "pattern": rf"^{digits}|-1{words})$"}
    number = {"type": "number", "minimum": 0, "maximum": 360_000_000}
    return WithJsonSchema({"anyOf": [number, {"const": -1}, text]})


Duration = Annotated[float | str, _duration("")]
DurationOrAuto = Annotated[float | str, _duration("|auto")]


class Which(BaseModel):
    """Without ``model``, or with null: all models."""

    model_config = ConfigDict(extra="forbid", title="Which")
    model: str | None = Field(None, examples=["tts"])


class Configuration(Which):
    """Seconds or ``90s``, ``15m``, ``1h``; -1 is never; ``keep_warm`` may be ``auto``.

    Omitted fields are not changed.
    """

    model_config = ConfigDict(extra="forbid", title="Configuration", allow_inf_nan=False)
    keep_warm: DurationOrAuto | None = Field(None, examples=["30s", "auto"])
    idle_timeout: Duration | None = Field(None, examples=["10m"])


class WhichNeighbor(BaseModel):
    """One of the status's neighbors."""

    model_config = ConfigDict(extra="forbid", title="WhichNeighbor")
    url: str = Field(examples=["http://127.0.0.1:11434"])


class Health(BaseModel):
    """The process serves."""

    status: Literal["ok"] = Field(description="Always `ok`.")


class Refusal(BaseModel):
    """The request was refused."""

    error: str = Field(description="Why, and what to do next, in English and Chinese.")
    known: list[str] | None = Field(None, description="The models that exist, if the one asked for does not.")
