"""Errors of the calls under ``/v1``, in the shape of OpenAI's: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi.responses import JSONResponse

from ... import errors
from ...observability.error_classification import is_out_of_device_memory, message_of
from ...sentences import Sentence
from ..server.api_keys import WrongKey
from ..server.cross_origin import refusal_body
from ..server.rate_limit import TooManyWrongKeys
from ..speech.recordings import DISK_IS_FULL, DiskFull, OutOfDiskSpace
from ..speech.service import ShuttingDown, explain
from ..speech.speaking import SpeechEditFailed
from ..speech.voices import UnknownVoice, VoiceExists, VoiceNotStored, VoicesFull, VoicesUnreadable

PARAMETERS: Mapping[str, str] = {
    "recording": "file", "prompt_text": "text", "target_text": "input", "task": "task", "sub_task": "sub_task",
    "voice": "voice", "voice_name": "name",
}  # fmt: skip
"""Parameter of a call by `errors.Field`."""
_CONTROLS = (Sentence("Prompt Text", "提示文本"), Sentence("Target Text", "目标文本"))
"""The page's controls that sentences of engines and of `SpeechService` name."""


class BadRequest(errors.InvalidInput):
    """A request whose parameter ``param`` is missing or has a wrong value."""

    def __init__(self, param: str | None, en: str, zh: str) -> None:
        super().__init__(en, zh)
        self._arguments = (param, en, zh)
        self.param = param


@contextmanager
def naming(**params: str) -> Iterator[None]:
    """Gives an `InvalidInput` raised in this block the call's own parameter, by its `errors.Field`."""
    try:
        yield
    except BadRequest:
        raise
    except errors.InvalidInput as error:
        if error.field in params and not hasattr(error, "param"):
            raise BadRequest(params[error.field], error.en, error.zh) from error
        raise


class UnknownSpeechModel(BadRequest):
    """The server has no model of this name."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(
            "model",
            f"There is no model {name!r:.40}: give one of {', '.join(known)}, or leave it out",
            f"没有模型 {name!r:.40}：可用 {'、'.join(known)}，也可以不填",
        )
        self._arguments = (name, known)


def check_model(name: str | None, known: tuple[str, ...]) -> None:
    """Raises `UnknownSpeechModel` for a name that is not ``known``."""
    if name is not None and name not in known:
        raise UnknownSpeechModel(name, known)


def check_task(task: str, offered: Iterable[str]) -> None:
    """Raises `BadRequest` for a task of edits that is not offered."""
    tasks = [name for name in offered if name != "clone"]
    if task not in tasks:
        raise BadRequest(
            "task",
            f"There is no task {task!r:.40}: give one of {', '.join(tasks)}",
            f"没有编辑任务 {task!r:.40}：可用 {'、'.join(tasks)}",
        )


class ChangeNotAllowed(errors.NotAllowed):
    """The caller may not change voices, nor decide how long the model stays on the device."""

    en = (
        "This is allowed only with an API key (--api-key) or the token (--control-token), sent as 'Authorization: "
        "Bearer KEY'; on the page's server also from its own machine, or for signed-in users (--auth user:password)."
    )
    zh = (
        "此操作需要 API 密钥（--api-key）或令牌（--control-token），以请求头 'Authorization: Bearer KEY' 发送；"
        "在提供页面的服务器上，也可从其本机执行，或由已登录用户（--auth user:password）执行。"
    )


class TooManyRequests(errors.ResidencyError):
    """The server has too many requests of this kind; ``retry_s``: seconds after which one may have ended."""

    def __init__(self, most: int, retry_s: int) -> None:
        super().__init__(
            f"{most} requests wait or run already: try again in {retry_s} s, or start the app with a larger "
            f"--max-requests.",
            f"已有 {most} 个请求在等待或运行：请 {retry_s} 秒后重试，或启动时调大 --max-requests。",
        )
        self._arguments = (most, retry_s)
        self.retry_s = retry_s


class BodyTooLarge(errors.ResidencyError):
    """A JSON body is larger than ``most_bytes``."""

    def __init__(self, most: str) -> None:
        super().__init__(
            f"The JSON body is larger than {most}: send recordings as multipart/form-data.",
            f"JSON 请求体超过 {most}：录音请以 multipart/form-data 发送。",
        )
        self._arguments = (most,)


_RETRY_S = 5
_CODES: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (WrongKey, 401, "authentication_error", "invalid_api_key"),
    (TooManyWrongKeys, 429, "rate_limit_error", "rate_limit_exceeded"),
    (errors.NotAllowed, 401, "authentication_error", "not_allowed"),
    (UnknownSpeechModel, 404, "invalid_request_error", "model_not_found"),
    (UnknownVoice, 400, "invalid_request_error", "voice_not_found"),
    (VoiceExists, 409, "invalid_request_error", "voice_exists"),
    (BodyTooLarge, 413, "invalid_request_error", None),
    (errors.InvalidInput, 400, "invalid_request_error", None),
    (TooManyRequests, 429, "rate_limit_error", "rate_limit_exceeded"),
    (errors.ModelBusy, 429, "rate_limit_error", "model_busy"),
    (VoiceNotStored, 503, "server_error", "voices_unavailable"),
    (VoicesUnreadable, 503, "server_error", "voices_unavailable"),
    (VoicesFull, 507, "server_error", "voices_full"),
    (DiskFull, 507, "server_error", "disk_full"),
    (OutOfDiskSpace, 507, "server_error", "disk_full"),
    (errors.RequestTimeout, 503, "server_error", "model_busy"),
    (errors.ManagerClosed, 503, "server_error", "shutting_down"),
    (ShuttingDown, 503, "server_error", "shutting_down"),
    (errors.DeviceLost, 503, "server_error", "device_lost"),
    (errors.WorkerEnded, 503, "server_error", "worker_ended"),
    (errors.NotReady, 503, "server_error", "not_ready"),
    (errors.RequestCancelled, 503, "server_error", "cancelled"),
    (errors.RequestStopped, 503, "server_error", "cancelled"),
)
"""Status, type and code by the first class that matches."""


def described(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Returns status, body and headers for an error. Logs it if the caller did not cause it."""
    if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
        error = OutOfDiskSpace()
    status, kind, code = _code(error.error if isinstance(error, SpeechEditFailed) else error)
    known = isinstance(error, errors.ResidencyError)
    message = message_of(error) if known else explain(error, has_history=False)
    param = getattr(error, "param", None) or PARAMETERS.get(getattr(error, "field", None) or "")
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in (429, 503):
        headers["Retry-After"] = str(getattr(error, "retry_s", _RETRY_S))
    return status, refusal_body(_naming_parameter(message, param) if param else message, kind, param, code), headers


def _code(error: Exception) -> tuple[int, str, str | None]:
    """Returns status, type and code of an error."""
    if isinstance(error, VoiceNotStored) and error.is_full:
        return 507, "server_error", "disk_full"
    if found := next((row for row in _CODES if isinstance(error, row[0])), None):
        return found[1:]
    if is_out_of_device_memory(error):
        return 503, "server_error", "device_full"
    if 400 <= getattr(error, "status_code", 500) < 500:  # StepAudioTTS's own exception
        return 400, "invalid_request_error", None
    return 500, "server_error", None


def _naming_parameter(message: Sentence, param: str) -> str:
    """Returns a message with the parameter in place of the page's control; before it, if it is not named at all."""
    en, zh = message.en, message.zh
    for control in _CONTROLS:
        en, zh = en.replace(control.en, param), zh.replace(control.zh, f" {param} ").strip()
    return Sentence(en, zh) if param in en else f"{param}: {Sentence(en, zh)}"


def refusal(error: Exception) -> JSONResponse:
    """Returns the response for an error."""
    status, content, headers = described(error)
    return JSONResponse(content, status, headers)
