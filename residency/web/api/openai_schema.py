"""Request and response bodies of the calls under ``/v1``. Unknown fields are ignored, as clients send some."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr, WithJsonSchema

AudioFormat = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]


class VoiceId(BaseModel):
    """A voice as an object."""

    model_config = ConfigDict(title="VoiceId")
    id: str = Field(description="Name of the voice.")


KeepAlive = Annotated[
    StrictInt | StrictFloat | StrictStr,
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^-?[0-9].*$"}]}),
]
Base64 = Annotated[str, WithJsonSchema({"type": "string", "contentEncoding": "base64"})]


class Speech(BaseModel):
    """A text to speak. Fields of OpenAI's call, and ``keep_alive``."""

    model_config = ConfigDict(title="Speech", allow_inf_nan=False)
    input: str = Field(description="The text. Long texts are spoken sentence by sentence.", examples=["Hello!"])
    voice: str | VoiceId | None = Field(
        None, description="Name of a voice, see `GET /v1/audio/voices`. Needed without `ref_audio`.", examples=["high"]
    )
    ref_audio: Base64 | None = Field(
        None, description="Instead of a stored voice: a recording in base64, in any common format (as in vLLM-Omni)."
    )
    ref_text: str | None = Field(
        None, description="The words said in `ref_audio`; without them, the recognizer writes them."
    )
    model: str | None = Field(None, description="A model of `GET /v1/models`, or OpenAI's name of one.")
    response_format: AudioFormat = Field(
        "mp3", description="`pcm`: 16-bit samples at 24 kHz, mono, little-endian, without a header."
    )
    speed: float = Field(1.0, ge=0.25, le=4, description="Tempo; the pitch stays.")
    instructions: str | None = Field(
        None,
        max_length=4096,
        description="If it names one emotion, style or speed of the engine (`happy`, `whisper`, `faster`), each "
        "sentence is edited accordingly; else it is ignored. A denied name (`not happy`) does not count. The header "
        "`X-Edit` says which. At most 4,096 characters, as in OpenAI's API.",
    )
    stream_format: Literal["audio", "sse"] = Field(
        "audio", description="`sse`: server-sent events with pieces of the audio in base64."
    )
    keep_alive: KeepAlive | None = Field(
        None,
        description="How long the model stays on the GPU after this request: seconds, or `5m`, `1h30m`; 0: not at all; "
        "-1: until another request ends or the model is offloaded. Needs an API key, or the permission for "
        "changes.",
    )


class VoiceSample(BaseModel):
    """A recording of a voice, with the words said in it, as JSON."""

    model_config = ConfigDict(title="VoiceSample")
    name: str = Field(description="1 to 64 letters, digits, spaces, `-`, `_`, `.` and `'`.", examples=["Ada"])
    audio: Base64 = Field(description="The recording in base64, in any common format.")
    text: str | None = Field(None, description="The words said in it; without them, the recognizer writes them.")


class Edit(BaseModel):
    """A recording and its change, as JSON."""

    model_config = ConfigDict(title="Edit", allow_inf_nan=False)
    audio: Base64 = Field(description="The recording in base64, in any common format.")
    text: str | None = Field(None, description="The words said in it; the recognizer writes them if there is one.")
    task: str = Field(description="`emotion`, `style`, `speed`, `vad`, `denoise` or `paralinguistic`.")
    sub_task: str | None = Field(None, description="For example `happy`, for the task `emotion`.")
    tagged_text: str | None = Field(None, description="For `paralinguistic`: the text with tags such as `[Laughter]`.")
    response_format: AudioFormat = Field("wav", description="Format of the response.")


class Transcription(BaseModel):
    """A recording to transcribe, as a form; further fields of OpenAI's call are ignored."""

    model_config = ConfigDict(title="Transcription")
    model: str | None = Field(None, description="A model of `GET /v1/models`, or OpenAI's name of one.")
    response_format: Annotated[str, WithJsonSchema({"type": "string", "enum": ["json", "text"]})] = Field(
        "json", description="`json` or `text`: transcripts have no times."
    )
    stream: bool = Field(False, description="Send the transcript as server-sent events, once it is complete.")


class SpeechModel(BaseModel):
    """A model, in OpenAI's shape."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Seconds since 1970; 0 where unknown.")
    owned_by: str


class SpeechModels(BaseModel):
    """The models for speech and transcription."""

    object: Literal["list"] = "list"
    data: list[SpeechModel]


class VoiceFacts(BaseModel):
    """A voice."""

    id: str = Field(description="The same as `name`.")
    name: str
    text: str = Field(description="The words said in its recording.")
    stored: bool = Field(description="False for voices that ship with the app; these cannot be deleted.")
    created: int = Field(description="Seconds since 1970; 0 for voices that ship with the app.")


class Voices(BaseModel):
    """All voices."""

    voices: list[VoiceFacts]


class DeletedVoice(BaseModel):
    """A voice that was deleted."""

    id: str
    deleted: Literal[True] = True


class Transcript(BaseModel):
    """The words said in a recording."""

    text: str


class ErrorFacts(BaseModel):
    """The error of a refused or failed request."""

    message: str = Field(description="Why, and what to do next, in English and Chinese.")
    type: str
    param: str | None
    code: str | None


class OpenAiError(BaseModel):
    """A refusal, in OpenAI's shape."""

    error: ErrorFacts
