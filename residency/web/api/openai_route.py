"""Calls with OpenAI's shape: their errors, and the description of their bodies on ``/docs``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from .openai_errors import refusal
from .openai_schema import OpenAiError

REFUSALS: dict[int | str, dict[str, Any]] = {
    code: {"model": OpenAiError, "description": description}
    for code, description in {
        400: "The request is invalid.",
        401: "An API key is needed, or permission for changes.",
        404: "There is no such model, or no such voice.",
        409: "A voice of this name exists.",
        413: "The request body is too large.",
        429: "Too many requests wait; `Retry-After` has the seconds until the next attempt.",
        500: "The engine failed.",
        503: "The model is not available in time, or the app is shutting down.",
        507: "The server has no disk space left.",
    }.items()
}


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
    """Describes a JSON body."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _schema(kind)}}}}


def form_body(kind: type[BaseModel]) -> dict[str, Any]:
    """Describes a form with a file."""
    schema = _schema(kind)
    properties = {name: value for name, value in schema["properties"].items() if name != "audio"}
    required = [name for name in schema.get("required", ()) if name != "audio"]
    file = {"type": "string", "format": "binary", "description": "The recording, in any common format."}
    schema = {**schema, "properties": {"file": file, **properties}, "required": ["file", *required]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def form_or_json_body(kind: type[BaseModel]) -> dict[str, Any]:
    content = {**form_body(kind)["requestBody"]["content"], **json_body(kind)["requestBody"]["content"]}
    return {"requestBody": {"required": True, "content": content}}


def _schema(kind: type[BaseModel]) -> dict[str, Any]:
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})
    text = json.dumps(schema)
    for name, definition in definitions.items():
        text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(definition))
    inlined: dict[str, Any] = json.loads(text)
    return inlined
