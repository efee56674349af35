"""Reads the bodies of calls under ``/v1``: JSON, and forms with a recording."""

from __future__ import annotations

import base64
import binascii
import json
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import IO, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from pydantic import BaseModel, ValidationError
from starlette import formparsers
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from ...units import readable_bytes
from ..server.bodies import announced_bytes
from ..speech.recordings import UNDER_WAY, Recordings
from ..speech.service import SpeechService
from .openai_errors import BadRequest, BodyTooLarge

Body = TypeVar("Body", bound=BaseModel)

MOST_JSON_BYTES = 20 << 20
"""Limit of JSON bodies, which are parsed in main memory."""
_IN_MEMORY_BYTES = 1 << 16
"""Size up to which a JSON body is held in main memory while it arrives; larger ones are in a file, as forms are."""
_parsers = CapacityLimiter(4)
"""Limits the larger bodies that are in main memory at a time."""
_FILES = ("file", "audio", "audio_sample", "input_audio", "recording", "ref_audio")
"""Names of the field with the recording, in forms of different programs."""
_MOST_VALUES = 50_000
"""Limit of commas and brackets in JSON: more than in the longest text. Base64 has none."""
_MOST_FIELDS = 30
_MOST_FIELD_BYTES = 1 << 20
_WANTED = {
    "literal_error": "（应为 {expected}）",
    "string_type": "（应为字符串）",
    "string_too_long": "（最多 {max_length} 个字符）",
    "greater_than_equal": "（应不小于 {ge:g}）",
    "less_than_equal": "（应不大于 {le:g}）",
    "finite_number": "（应为有限的数）",
    "float_type": "（应为数字）",
    "float_parsing": "（应为数字）",
    "bool_parsing": "（应为 true 或 false）",
}
"""What Pydantic's messages say, in Chinese, by its type of error."""
_OF_FIELDS = {
    "keep_alive": ("Input should be a number of seconds, or a string such as '5m'", "（应为秒数，或 '5m' 等字符串）"),
    "voice": (
        "Input should be a name, or an object with the name as its 'id'",
        "（应为名称，或以 'id' 给出名称的对象）",
    ),
}
"""The same, in both languages, for fields of several types: Pydantic's message is about the first of them only."""
_ROOM_BYTES = 16 << 20
"""Disk space that is reserved at a time for a form of unknown length."""


def keep_forms_in(folder: str) -> None:
    """Makes Starlette keep large files of forms, of all calls, in ``folder`` instead of the system's temporary one."""
    formparsers.SpooledTemporaryFile = partial(tempfile.SpooledTemporaryFile, dir=folder)  # type: ignore[attr-defined, assignment]


async def read_json(
    request: Request, kind: type[Body], recordings: Recordings, param: str, most_bytes: int = MOST_JSON_BYTES
) -> tuple[Body, Upload | None]:
    """Parses the body as JSON, whatever its Content-Type; returns it with the recording in its field ``param``.

    The field is empty then; the caller closes the upload. Raises `BadRequest`, `BodyTooLarge` and `DiskFull`.
    """
    if (announced_bytes(request.scope) or 0) > most_bytes:
        raise BodyTooLarge(readable_bytes(most_bytes))
    size = 0
    with ExitStack() as held:
        receive = _reserving(request, recordings, held, _IN_MEMORY_BYTES)
        file = held.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, dir=recordings.folder))
        async for piece in Request(request.scope, receive).stream():
            size += len(piece)
            if size > most_bytes:
                raise BodyTooLarge(readable_bytes(most_bytes))
            if size > _IN_MEMORY_BYTES:
                await to_thread.run_sync(file.write, piece)
            else:
                file.write(piece)
        large = size > _IN_MEMORY_BYTES
        return await to_thread.run_sync(_read, file, kind, recordings, param, limiter=_parsers if large else None)


def _read(file: IO[bytes], kind: type[Body], recordings: Recordings, param: str) -> tuple[Body, Upload | None]:
    """Does the rest of `read_json`."""
    file.seek(0)
    values = _parsed(file.read())
    if not isinstance(values, dict):
        raise BadRequest(None, "Send a JSON object; /docs lists its fields", "请发送 JSON 对象；字段见 /docs")
    body = checked(kind, values)
    text = getattr(body, param)
    if text is None:
        return body, None
    setattr(body, param, "")
    data = _decoded(text)
    if not data:
        raise BadRequest(
            param,
            f"{param} is empty, or no base64: encode the file's bytes",
            f"{param} 为空或不是 base64：请对文件内容进行编码",
        )
    with ExitStack() as held:
        held.enter_context(recordings.reserved(len(data)))
        os.makedirs(recordings.folder, exist_ok=True)
        recording = held.enter_context(tempfile.TemporaryFile(dir=recordings.folder))
        recording.write(data)
        return body, Upload(param, recording, held.pop_all().close)


def _parsed(data: bytes) -> Any:
    """Parses JSON; returns None if it is no JSON, or has so many values that parsing would delay all other requests."""
    if data.count(b",") + data.count(b"[") + data.count(b"{") > _MOST_VALUES:
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def checked(kind: type[Body], values: Mapping[str, Any]) -> Body:
    """Returns the model of a body; raises `BadRequest` for the first field that is missing or wrong.

    Some clients send null for fields that are not set.
    """
    try:
        return kind.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "missing":
            raise BadRequest(name, f"{name} is missing: send it", f"缺少 {name}：请发送") from None
        wanted = _WANTED.get(first["type"], "").format(**first.get("ctx", {}))
        en, zh = _OF_FIELDS.get(name or "", (first["msg"], wanted.replace(" or ", "、").replace(", ", "、")))
        raise BadRequest(name, f"{name} is not valid ({en}): see /docs", f"{name} 无效{zh}：参见 /docs") from None


class Upload:
    """The file with the recording of a request. `close` deletes it, and may be called repeatedly.

    ``param``: the parameter that has the recording.
    """

    def __init__(self, param: str, file: IO[bytes], close: Callable[[], Any]) -> None:
        self.param, self._file, self.close = param, file, close

    @contextmanager
    def stored(self, service: SpeechService, recordings: Recordings) -> Iterator[str]:
        """Yields the path of the recording in a form that engines read; deletes it at the end. Closes the upload.

        Reads and writes files: not for the event loop. Raises `InvalidInput` and `DiskFull`.
        """
        os.makedirs(service.folder, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(
                prefix=f"{UNDER_WAY}-upload-", dir=service.folder, ignore_cleanup_errors=True
            ) as workshop,
            recordings.reserved(self._size()),
        ):
            path = os.path.join(workshop, "recording")
            with open(path, "wb") as target:
                shutil.copyfileobj(self._file, target)
            self.close()
            readable = service.incoming.readable(path)
            try:
                yield readable
            finally:
                if readable != path:
                    recordings.remove(None, readable)

    def _size(self) -> int:
        self._file.seek(0, os.SEEK_END)
        size = self._file.tell()
        self._file.seek(0)
        return size


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"


async def read_upload(request: Request, kind: type[Body], recordings: Recordings) -> tuple[Body, Upload]:
    """Reads a form, or JSON with ``audio`` in base64. The caller closes the upload. Raises `BadRequest`, `DiskFull`."""
    if not is_form(request):
        if "audio" not in kind.model_fields:
            raise BadRequest(
                _FILES[0], "Send a form (multipart/form-data) with the recording as the file 'file'",
                "请发送表单（multipart/form-data），录音为文件字段 'file'",
            )  # fmt: skip
        body, upload = await read_json(request, kind, recordings, "audio")
        assert upload is not None, "it is required"
        return body, upload
    with ExitStack() as held:
        form = await _read_form(request, recordings, held)
        optional = {name for name, about in kind.model_fields.items() if not about.is_required()}
        values: dict[str, Any] = {
            name: value
            for name, value in form.multi_items()
            if isinstance(value, str) and (value or name not in optional)  # forms have no null
        }
        file = next((form[name] for name in _FILES if isinstance(form.get(name), UploadFile)), None)
        if not isinstance(file, UploadFile):
            raise BadRequest(
                _FILES[0],
                f"The form has no recording: send it as the file {_FILES[0]!r}",
                f"表单中没有录音：请以文件字段 {_FILES[0]!r} 发送",
            )
        body = checked(kind, {"audio": "", **values})
        return body, Upload(_FILES[0], file.file, held.pop_all().close)


def _reserving(
    request: Request, recordings: Recordings, held: ExitStack, room_bytes: float = 0.0
) -> Callable[[], Awaitable[Message]]:
    """Returns ``request.receive``, which reserves disk space for what is beyond ``room_bytes``, until ``held`` ends.

    It makes the folder of the recordings too.
    """
    announced = announced_bytes(request.scope)

    async def receive() -> Message:
        nonlocal room_bytes
        message = await request.receive()
        room_bytes -= len(message.get("body", b""))
        if room_bytes < 0:
            least_bytes = announced or -room_bytes
            room = recordings.reserved(max(announced or _ROOM_BYTES, -room_bytes), least_bytes)
            room_bytes += await to_thread.run_sync(held.enter_context, room)
            await to_thread.run_sync(partial(os.makedirs, recordings.folder, exist_ok=True))
        return message

    return receive


async def _read_form(request: Request, recordings: Recordings, held: ExitStack) -> FormData:
    """Reads a form; ``held`` deletes its file, whose disk space is reserved until then."""
    try:
        form = await Request(request.scope, _reserving(request, recordings, held)).form(
            max_files=1, max_fields=_MOST_FIELDS, max_part_size=_MOST_FIELD_BYTES
        )
    except (HTTPException, ValueError, KeyError) as error:  # the last two: of python-multipart, before Starlette 1
        reason = getattr(error, "detail", None) or str(error) or type(error).__name__
        raise BadRequest(
            None, f"The form cannot be read ({reason}): send it as multipart/form-data",
            f"无法读取表单（{reason}）：请以 multipart/form-data 发送",
        ) from None  # fmt: skip
    for value in form.values():
        if isinstance(value, UploadFile):
            held.callback(value.file.close)
    return form


def _decoded(text: str) -> bytes:
    """Decodes base64; returns nothing if it is broken."""
    data = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        return b""
