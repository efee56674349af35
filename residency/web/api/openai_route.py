"""Calls with OpenAI's shape: their errors, and the description of their bodies on ``/docs``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ..server.api_keys import WrongKey
from ..speech.recordings import DiskFull
from ..speech.service import ShuttingDown
from ..speech.voices import VoiceExists
from .openai_errors import BadRequest, BodyTooLarge, TooManyRequests, UnknownSpeechModel, described, refusal
from .openai_schema import OpenAiError

_REFUSALS: dict[int, tuple[str, Exception | None]] = {
    400: (
        "The request is invalid.",
        BadRequest("voice", "voice is missing: send its name", "缺少 voice：请发送声音名称"),
    ),
    401: ("An API key is needed, or permission for changes.", WrongKey()),
    403: ("Requests from pages of other sites are refused.", None),
    404: ("There is no such model.", UnknownSpeechModel("gpt-5", ("step-audio-editx", "tts-1"))),
    409: ("A voice of this name exists.", VoiceExists("Ada")),
    413: ("The request body is too large.", BodyTooLarge("20 MB")),
    429: (
        "Too many requests wait, or this address has sent too many wrong keys; `Retry-After` has the seconds to wait.",
        TooManyRequests(100, 5),
    ),
    500: ("The engine failed.", None),
    503: (
        "The model is not available in time, its worker process has ended, the store of the voices does not answer, "
        "or the app is shutting down.",
        ShuttingDown(),
    ),
    507: ("The server has no disk space left.", DiskFull()),
}
"""Description and example by status code."""
_HEADERS = {
    "Server-Timing": "Milliseconds that the request waited for the model, and why: `wait`, `queue`, `load`, `restore`.",
    "X-Edit": "The edit that `instructions` name, such as `emotion/happy`, or `none`; only with `instructions`.",
    "Cache-Control": "`no-store`.",
    "X-Accel-Buffering": "`no`: nginx passes the answer on as it comes.",
    "Retry-After": "Seconds to wait.",
    "WWW-Authenticate": "`Bearer`.",
}
_OF_REFUSALS = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}
"""Header by status code."""
_BASE64 = ("audio", "ref_audio")
"""Fields of JSON in place of a form's file."""


def refusals(*codes: int, unknown: tuple[str, Exception | None] = _REFUSALS[404]) -> dict[int | str, dict[str, Any]]:
    """Describes the refusals of a call; ``unknown``: what its 404 means."""
    found = {**_REFUSALS, 404: unknown}
    return {code: _refusal(code, *found[code]) for code in (403, *codes)}


def _refusal(code: int, description: str, example: Exception | None) -> dict[str, Any]:
    content = {"application/json": {"example": described(example)[1]}} if example else {}
    sent = _headers(_OF_REFUSALS[code]) if code in _OF_REFUSALS else {}
    return {"model": OpenAiError, "description": description, "content": content, **sent}


def streamed(*media_types: str, headers: Sequence[str] = ()) -> dict[str, Any]:
    """Describes a successful answer that is a `Streamed`, with further ``headers``, beside that of a model."""
    binary = {name: {"format": "binary"} if name.startswith("audio/") else {} for name in media_types}
    content = {name: {"schema": {"type": "string", **form}} for name, form in binary.items()}
    return {"content": content, **_headers("Cache-Control", "X-Accel-Buffering", "Server-Timing", *headers)}


def _headers(*names: str) -> dict[str, Any]:
    return {"headers": {name: {"description": _HEADERS[name], "schema": {"type": "string"}} for name in names}}


class OpenAiRoute(APIRoute):
    """A call whose errors have OpenAI's shape."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except ClientDisconnect:  # in the middle of the body: nobody gets an answer
                raise
            except Exception as error:
                return refusal(error)

        return handled


def json_body(kind: type[BaseModel]) -> dict[str, Any]:
    """Describes a JSON body, whose optional fields may be null."""
    schema = _schema(kind)
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            about = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {**about, "anyOf": [field, {"type": "null"}]}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def form_body(kind: type[BaseModel]) -> dict[str, Any]:
    """Describes a form with a file."""
    schema = _schema(kind)
    properties = {name: value for name, value in schema["properties"].items() if name not in _BASE64}
    required = [name for name in schema.get("required", ()) if name not in _BASE64]
    file = {"type": "string", "format": "binary", "description": "The recording, in any common format."}
    schema = {**schema, "properties": {"file": file, **properties}, "required": ["file", *required]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def either_body(*bodies: dict[str, Any]) -> dict[str, Any]:
    content = {kind: schema for body in bodies for kind, schema in body["requestBody"]["content"].items()}
    return {"requestBody": {"required": True, "content": content}}


def _schema(kind: type[BaseModel]) -> dict[str, Any]:
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})
    text = json.dumps(schema)
    for name, definition in definitions.items():
        text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(definition))
    inlined: dict[str, Any] = json.loads(text)
    return inlined
