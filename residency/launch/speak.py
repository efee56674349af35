"""``python -m gpu_manager speak``: a running app speaks a text into a file."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..sentences import in_locale
from .http_calls import add_secret, add_url, failed, opened, untrusted

FORMATS = ("mp3", "opus", "aac", "flac", "wav", "pcm")
_BY_SUFFIX = {**{f".{name}": name for name in FORMATS}, ".ogg": "opus"}
_STDOUT = "-"


class _EndedEarly(Exception):
    """The connection ended before the speech."""


def main(argv: Sequence[str]) -> int:
    """Writes the speech; returns 0 if it is complete, 1 if the app refuses, does not answer, or ends early."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    output = arguments.output or _STDOUT
    if arguments.output is None and sys.stdout.isatty():
        parser.error(
            in_locale(
                "a terminal cannot show speech: give a file (-o speech.wav), or -o - / "
                "终端无法显示语音：请指定文件（-o speech.wav），或 -o -"
            )
        )
    text = sys.stdin.buffer.read().decode(errors="replace") if arguments.text == _STDOUT else arguments.text
    return saved("speech", _body(arguments, text), output, arguments)


def saved(
    call: str, body: dict[str, Any], output: str, arguments: argparse.Namespace, recording: bytes | None = None
) -> int:
    """Calls ``/v1/audio/...`` and saves the audio of the answer; returns the exit code, see `main`.

    ``arguments`` has the ``url`` of the app and its ``api_key``. With a ``recording``, a form is sent, whose size only
    the app limits.
    """
    content, kind = (json.dumps(body).encode(), "application/json") if recording is None else _form(body, recording)
    try:
        request = urllib.request.Request(f"{arguments.url.rstrip('/')}/v1/audio/{call}", content)
        request.add_header("Content-Type", kind)
        answer = opened(request, arguments.api_key)
        if not answer.headers.get_content_type().startswith(("audio/", "application/octet-stream")):
            raise ValueError("another program answers")
    except (OSError, ValueError, http.client.HTTPException) as error:
        return failed(_refusal(error, arguments.url))
    try:
        with answer, _written(output) as file:
            _copy(answer, file)
    except BrokenPipeError:
        return 1  # the program that reads the output wants no more
    except _EndedEarly:
        return failed(
            f"The speech ended early, and no file was saved: the log of the app at {arguments.url} has the reason / "
            f"语音未完成，未保存文件：原因见 {arguments.url} 应用的日志"
        )
    except OSError as error:
        return failed(
            f"The speech cannot be saved ({error}): give another file / 无法保存语音（{error}）：请换一个文件"
        )
    return 0


def _form(fields: dict[str, str], recording: bytes) -> tuple[bytes, str]:
    """Returns a form with the recording as its file, and its content type."""
    boundary = secrets.token_hex(16)
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="'
    parts = [f'{head}{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()]
    file = f'{head}file"; filename="recording"\r\nContent-Type: application/octet-stream\r\n\r\n'
    begin = "".join([*parts, file]).encode(errors="replace")
    return begin + recording + f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m gpu_manager speak", description="Speak a text with the voice of a running app.", allow_abbrev=False
    )
    add = parser.add_argument
    add("text", help="the text; -: standard input")
    add("--voice", required=True, help="the name of a stored voice")
    add("-o", "--output", metavar="FILE", help="the file, written when the speech is complete; -: standard output")
    add("--format", choices=FORMATS, help="default: by the name of the file, else wav")
    add("--speed", type=float, help="0.25 to 4 (default: 1)")
    add("--instructions", help="an emotion, style or speed of the engine, such as happy")
    add_app(parser)
    return parser


def add_app(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the running app: ``--url`` and ``--api-key``."""
    add_url(parser)
    add_secret(parser, "--api-key", os.environ.get("GPU_TTS_API_KEY"), "or GPU_TTS_API_KEY")


def _body(arguments: argparse.Namespace, text: str) -> dict[str, Any]:
    format = arguments.format or _BY_SUFFIX.get(Path(arguments.output or "").suffix.lower(), "wav")
    body = {"input": text, "voice": arguments.voice, "response_format": format}
    optional = {"speed": arguments.speed, "instructions": arguments.instructions}
    body |= {name: value for name, value in optional.items() if value is not None}
    return body


@contextmanager
def _written(output: str) -> Iterator[BinaryIO]:
    """Yields a file that becomes ``output`` at the end of the block, unless that raises."""
    path = Path(os.path.realpath(output))
    if output == _STDOUT:
        with open(sys.stdout.fileno(), "wb", closefd=False) as file:
            yield file
    elif path.exists() and not path.is_file():  # such as /dev/null, or a pipe
        with path.open("wb") as file:
            yield file
    else:
        part = path.with_name(f".{path.name[:200]}.{os.getpid()}.part")
        try:
            with part.open("xb") as file:
                yield file
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _copy(answer: http.client.HTTPResponse, file: BinaryIO) -> None:
    """Writes each part of the speech at once."""
    while True:
        try:
            part = answer.read1(1 << 16)
        except (OSError, http.client.HTTPException) as error:
            raise _EndedEarly from error
        if not part:
            break
        file.write(part)
        file.flush()
    if answer.length:
        raise _EndedEarly


def _refusal(error: Exception, url: str) -> str:
    """Describes a failed call, in English and Chinese."""
    if isinstance(error, urllib.error.HTTPError):
        with suppress(ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
            refused = json.load(error)["error"]
            return str(refused["message"] if isinstance(refused, dict) else refused)
        if error.code not in (404, 405):
            return f"{error.url}: {error.code} {error.reason}"
    return untrusted(error, url) or (
        f"No app with a speech API answers at {url} ({error}): start one, or give --url / "
        f"{url} 没有提供语音接口的应用（{error}）：请先启动，或用 --url 指定地址"
    )
