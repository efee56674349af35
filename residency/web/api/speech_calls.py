"""Speech, transcription, edits and voices over HTTP, as clients of OpenAI's speech API call them: ``/v1``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import soundfile
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from ...cancellation import current
from ...errors import InvalidInput
from ..server.api_keys import ApiKeys
from ..server.rate_limit import network
from ..speech.encoding import MEDIA_TYPES, Encoder
from ..speech.recordings import Recordings
from ..speech.service import SpeechService
from ..speech.speaking import Speaker, SpeechRequest, most_bytes
from ..speech.voices import UnknownVoice, Voice, sample_of
from .bodies import Upload, is_form, keep_forms_in, read_json, read_upload
from .openai_errors import BadRequest, ChangeNotAllowed, check_model, check_task, naming, refusal
from .openai_route import OpenAiRoute, either_body, form_body, json_body, refusals, streamed
from .openai_schema import (
    DeletedVoice,
    Edit,
    Speech,
    SpeechModels,
    Transcript,
    Transcription,
    VoiceFacts,
    Voices,
    VoiceSample,
)
from .server_timing import server_timing
from .slots import Slots
from .streamed import Streamed, Work, Write, event
from .turns import Turn, Turns

OF_OPENAI = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")
"""Names of OpenAI's models for speech, which many clients send by default: the engine speaks for them too."""
OF_OPENAI_TRANSCRIBE = ("whisper-1", "gpt-4o-transcribe", "gpt-4o-mini-transcribe")
_TRANSCRIPTS = {"json": "application/json", "text": "text/plain; charset=utf-8", "sse": "text/event-stream"}
"""Media type of a transcript by its form."""
_BLOCK_FRAMES = 1 << 16
_OF_WORK = (413, 429, 500, 503, 507)
"""Status codes of calls that receive a body and use a model or the disk."""


@dataclass(eq=False)
class SpeechCalls:
    """The calls; their docstrings are the descriptions of the OpenAPI page.

    Attributes:
        model: name of the engine in ``GET /v1/models``.
        others: further engines, by name.
        slots: limit of requests that wait or run, from the end of their bodies on.
        watching: calls a function with each lease that a request enters; see `GPUResourceManager.watching`.
        keep_alive: returns the seconds of a ``keep_alive``, which has an effect only with a manager.
        readers, store_readers: limits of threads, of those that may wait for the store of the voices and of others.
    """

    service: SpeechService
    speaker: Speaker
    recordings: Recordings
    keys: ApiKeys
    model: str
    slots: Slots
    watching: Callable[[Callable[[Any], object]], AbstractContextManager[None]]
    keep_alive: Callable[[float | str], float]
    others: Mapping[str, Speaker] = field(default_factory=dict)
    readers: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(4))
    store_readers: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(4))
    turns: Turns = field(default_factory=Turns)

    def __post_init__(self) -> None:
        self.threads = CapacityLimiter(self.slots.most)
        keep_forms_in(self.recordings.folder)

    def add_to(self, app: FastAPI) -> None:
        """Adds the calls to an application."""
        add = app.router.add_api_route
        speaks: dict[str, Any] = {"tags": ["speech"], "route_class_override": OpenAiRoute}
        voices: dict[str, Any] = {"tags": ["voices"], "route_class_override": OpenAiRoute}
        add("/v1/models", self.models, response_model=SpeechModels, responses=refusals(401, 429), **speaks)
        stored = {"description": "The voice was stored.", **streamed()}
        spoken: dict[str, Any] = {"response_class": Response, "response_model": None, "methods": ["POST"], **speaks}
        events = streamed(*MEDIA_TYPES.values(), "text/event-stream", headers=["X-Edit"])
        add("/v1/audio/speech", self.speech, openapi_extra=either_body(json_body(Speech), form_body(Speech)),
            responses={200: events, **refusals(400, 401, 404, *_OF_WORK)}, **spoken)  # fmt: skip
        add("/v1/audio/edits", self.edits, openapi_extra=either_body(form_body(Edit), json_body(Edit)),
            responses={200: streamed(*MEDIA_TYPES.values()), **refusals(400, 401, *_OF_WORK)}, **spoken)  # fmt: skip
        add("/v1/audio/transcriptions", self.transcriptions, response_model=Transcript, methods=["POST"],
            responses={200: streamed("text/plain", "text/event-stream"), **refusals(400, 401, 404, *_OF_WORK)},
            openapi_extra=form_body(Transcription), **speaks)  # fmt: skip
        add("/v1/audio/voices", self.voices, response_model=Voices, responses=refusals(401, 429, 503), **voices)
        add("/v1/audio/voices", self.add_voice, response_model=VoiceFacts, methods=["POST"], status_code=201,
            responses={201: stored, **refusals(400, 401, 409, *_OF_WORK)},
            openapi_extra=either_body(form_body(VoiceSample), json_body(VoiceSample)), **voices)  # fmt: skip
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        unknown = ("There is no such voice.", UnknownVoice("Ada", ("high", "low")))
        add("/v1/audio/voices/{name}", self.remove_voice, response_model=DeletedVoice, methods=["DELETE"],
            responses=refusals(400, 401, 404, 429, 503, 507, unknown=unknown), openapi_extra={"parameters": [name]},
            **voices)  # fmt: skip

    async def models(self, request: Request) -> JSONResponse:
        """The engine, and the recognizer where there is one. OpenAI's names of such models are accepted too."""
        self.keys.check(request)
        names = [self.model, *self.others, *(OF_OPENAI_TRANSCRIBE[:1] if self.service.transcribes else ())]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "gpu-managed-tts"} for name in names]
        return JSONResponse({"object": "list", "data": data})

    async def speech(self, request: Request) -> Response:
        """Speak a text with a voice. The audio is sent while it is spoken; closing the connection cancels the rest.

        A form has the recording of a voice as the file `file`, in place of `ref_audio`. The header `Server-Timing` says
        how long the request waited for the model, and why.
        """
        self.keys.check(request)
        with ExitStack() as held:
            turn = held.enter_context(self.turns.taken(network(request)))
            body, upload = await self._read_speech(request, held)
            held.enter_context(self.slots.taken())
            check_model(body.model, (self.model, *self.others, *OF_OPENAI))
            speaker = self.others.get(body.model or "", self.speaker)
            keep_warm_s = self._keep_warm(request, body.keep_alive)
            words = None if upload is None else self._words("ref_text", body.ref_text)
            voice = _name(body) if upload is None else None
            if ships := voice is None or sample_of(voice) is not None:
                turn.received()
            ask = partial(
                speaker.checked, body.input, voice, body.response_format, body.speed, body.instructions, keep_warm_s
            )
            with naming(recording="voice"):
                asked = await to_thread.run_sync(ask, limiter=self.readers if ships else self.store_readers)
            turn.received()  # only now, if the store of the voices was asked: it may be slow, as a body may
            if upload is None:
                work: Work = naming(recording="voice")(partial(speaker.speak, asked))
            else:
                work = partial(self._speak_with, speaker, asked, upload, words)
            return self._streamed(
                work, MEDIA_TYPES[body.response_format], held.pop_all(),
                most_bytes(body.input, body.response_format, body.speed), turn, sse=body.stream_format == "sse",
                headers={"x-edit": "/".join(asked.edit or ("none",))} if body.instructions else {},
            )  # fmt: skip

    async def _read_speech(self, request: Request, held: ExitStack) -> tuple[Speech, Upload | None]:
        """Reads JSON, or a form with a recording; returns the request, and the recording that it brings."""
        json_body = partial(read_json, param="ref_audio")
        body, upload = await (read_upload if is_form(request) else json_body)(request, Speech, self.recordings)
        if upload:
            held.callback(upload.close)
        return body, upload

    def _speak_with(
        self, speaker: Speaker, asked: SpeechRequest, upload: Upload, words: str | None, write: Write
    ) -> None:
        """Speaks with a recording that the request has brought; without ``words`` the recognizer writes them."""
        named = naming(recording=upload.param, prompt_text="ref_text")
        with named, upload.stored(self.service, self.recordings) as recording:
            voice = Voice("", words or self.service.transcribe(recording), recording, False, 0)
            speaker.speak(speaker.with_voice(asked, voice), write)

    def _words(self, param: str, text: str | None) -> str:
        """Returns the words of a recording, empty if the recognizer is to write them; raises `InvalidInput`."""
        with naming(prompt_text=param):
            words = self.service.checked_text("prompt_text", text)
        if not words and not self.service.transcribes:
            raise BadRequest(
                param, f"{param} is missing: send the words that are said in the recording",
                f"缺少 {param}：请发送录音中所说的内容",
            )  # fmt: skip
        return words

    async def edits(self, request: Request) -> Response:
        """Change a recording: its emotion, style, speed, pauses or noise, or sounds such as laughter at tags.

        A call of this server, which OpenAI's API does not have. A form has the recording as the file `file`.
        """
        self.keys.check(request)
        with ExitStack() as held:
            turn = held.enter_context(self.turns.taken(network(request)))
            body, upload = await read_upload(request, Edit, self.recordings)
            held.callback(upload.close)
            held.enter_context(self.slots.taken())
            turn.received()
            check_task(body.task, self.service.edit_types)
            with _naming_edits(upload):
                check = self.service.checked_edit
                await to_thread.run_sync(
                    check, body.text, body.task, body.sub_task, body.tagged_text, limiter=self.readers
                )
            work = partial(self._edit, body, upload)
            return self._streamed(work, MEDIA_TYPES[body.response_format], held.pop_all(), turn=turn)

    def _edit(self, body: Edit, upload: Upload, write: Write) -> None:
        with _naming_edits(upload), upload.stored(self.service, self.recordings) as recording:
            text = body.text or (self.service.transcribe(recording) if self.service.transcribes else "")
            edited, _ = self.service.edit(recording, text, body.task, body.sub_task, body.tagged_text)
        try:
            with (
                soundfile.SoundFile(edited) as sound,
                Encoder(body.response_format, sound.samplerate, whole=sound.frames) as encoder,
            ):
                for block in sound.blocks(_BLOCK_FRAMES, dtype="float32"):
                    write(encoder.encode(block))
                write(encoder.finish())
        finally:
            self.recordings.remove(None, edited)

    async def transcriptions(self, request: Request) -> Response:
        """Write the words of a recording, sent as a form with the file `file`. Needs --enable-auto-transcribe."""
        self.keys.check(request)
        with ExitStack() as held:
            body, upload = await read_upload(request, Transcription, self.recordings)
            held.callback(upload.close)
            held.enter_context(self.slots.taken())
            check_model(body.model, OF_OPENAI_TRANSCRIBE)
            if body.response_format not in ("json", "text"):
                raise BadRequest(
                    "response_format",
                    "Transcripts have no times: response_format is json or text",
                    "转写结果不含时间信息：response_format 只能是 json 或 text",
                )
            self.service.recognizer()
            form = "sse" if body.stream else body.response_format
            return self._streamed(partial(self._transcribe, form, upload), _TRANSCRIPTS[form], held.pop_all())

    def _transcribe(self, form: str, upload: Upload, write: Write) -> None:
        with upload.stored(self.service, self.recordings) as recording:
            text = self.service.transcribe(recording)
        if form == "sse":
            delta = event({"type": "transcript.text.delta", "delta": text})
            write(delta + event({"type": "transcript.text.done", "text": text}))
        else:
            write((json.dumps({"text": text}, ensure_ascii=False) if form == "json" else text + "\n").encode())

    async def voices(self, request: Request) -> JSONResponse:
        """The voices that `voice` may name."""
        self.keys.check(request)
        voices = await to_thread.run_sync(self.speaker.voices.all, limiter=self.store_readers)
        return JSONResponse({"voices": [_facts(voice).model_dump() for voice in voices]})

    async def add_voice(self, request: Request) -> Response:
        """Store a voice: a recording (the file `file`, or `audio` in base64), its name, and the words said in it.

        Without `text`, the recognizer writes the words, where there is one. Needs an API key, or the permission for
        changes.
        """
        self._check_change(request)
        with ExitStack() as held:
            body, upload = await read_upload(request, VoiceSample, self.recordings)
            held.callback(upload.close)
            held.enter_context(self.slots.taken())
            work = partial(self._store, body.name, self._words("text", body.text), upload)
            return self._streamed(work, "application/json", held.pop_all(), status=201)

    def _store(self, name: str, text: str, upload: Upload, write: Write) -> None:
        name = self.speaker.voices.checked_new(name)
        with naming(recording=upload.param), upload.stored(self.service, self.recordings) as recording:
            voice = self.speaker.voices.add(name, text or self.service.transcribe(recording), recording)
        write(_facts(voice).model_dump_json().encode())

    async def remove_voice(self, request: Request) -> JSONResponse:
        """Delete a stored voice. Needs an API key, or the permission for changes."""
        self._check_change(request)
        try:
            voice = await to_thread.run_sync(
                self.speaker.voices.remove, request.path_params["name"], limiter=self.store_readers
            )
        except UnknownVoice as error:
            unknown = refusal(error)
            unknown.status_code = 404
            return unknown
        return JSONResponse(DeletedVoice(id=voice.name).model_dump())

    def _streamed(
        self, work: Work, media_type: str, held: ExitStack, most_bytes: int = 0, turn: Turn | None = None,
        *, status: int = 200, headers: dict[str, str] | None = None, sse: bool = False,
    ) -> Streamed:  # fmt: skip
        """Returns the response of ``work``, for whose result ``most_bytes`` are reserved. It closes ``held``.

        At its ``turn`` the request enters the queue of each model.
        """
        leases: list[Any] = []

        def watched(write: Write) -> None:
            def watch(lease: Any) -> None:
                if all(other.model != lease.model or other.place is None for other in leases):  # not within another
                    leases.append(lease)
                if cancellation := current():
                    cancellation.on_cancel(lease.cancel)
                if turn:
                    turn.joins(lease)

            if turn and (cancellation := current()):
                cancellation.on_cancel(turn.end)
            with self.watching(watch):
                work(write)

        room = partial(self.recordings.reserved_until_known, most_bytes)
        return Streamed(
            watched, media_type, self.service.folder, room, held, self.threads, status=status, headers=headers,
            sse=sse, server_timing=lambda: server_timing(leases, turn.waited_s if turn else 0.0),
        )  # fmt: skip

    def _check_change(self, request: Request) -> None:
        self.keys.check(request)
        if not self.keys.may_change(request):
            raise ChangeNotAllowed

    def _keep_warm(self, request: Request, keep_alive: float | str | None) -> float | None:
        """Returns the seconds of a ``keep_alive``, None without one; raises `BadRequest` and `ChangeNotAllowed`."""
        if keep_alive is None:
            return None
        try:
            keep_warm_s = self.keep_alive(keep_alive)
        except InvalidInput as error:
            raise BadRequest("keep_alive", error.en, error.zh) from None
        if not self.keys.may_change(request):
            raise ChangeNotAllowed
        return keep_warm_s


def _name(body: Speech) -> str:
    """Returns the name of the voice; raises `BadRequest` without one."""
    if body.voice is None:
        raise BadRequest("voice", "voice is missing: send its name", "缺少 voice：请发送声音名称")
    return body.voice if isinstance(body.voice, str) else body.voice.id


def _naming_edits(upload: Upload) -> AbstractContextManager[None]:
    return naming(prompt_text="text", target_text="tagged_text", recording=upload.param)


def _facts(voice: Voice) -> VoiceFacts:
    return VoiceFacts(id=voice.name, name=voice.name, text=voice.text, stored=voice.stored, created=voice.created)
