"""``python -m gpu_manager``: controls a running app from a shell."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import UnknownModel
from ..sentences import holder_of, in_locale, remarks
from ..units import readable_bytes
from . import infer, speak
from .http_calls import add_secret, add_url, failed, opened, untrusted

if TYPE_CHECKING:
    from ..status_types import ModelStatus, Status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and prints the status; returns 0 if it is done or pending, 1 if refused or unreachable."""
    argv = sys.argv[1:] if argv is None else argv
    for name, command in (("speak", speak.main), ("infer", infer.main)):
        if list(argv[:1]) == [name]:
            return command(argv[1:])
    parser = _parser()
    arguments = parser.parse_args(argv)
    times = [arguments.keep_warm, arguments.idle_timeout]
    if (arguments.command == "configure") != any(time is not None for time in times):
        parser.error(
            in_locale(
                "--keep-warm and --idle-timeout go with configure, which needs one of them / "
                "configure 需要 --keep-warm 或 --idle-timeout，且只有它使用这两个参数"
            )
        )
    try:
        done, status = _call(arguments)
    except (UnknownModel, OSError, ValueError, http.client.HTTPException) as error:
        return failed(_reason(error, arguments.url))
    print(json.dumps(status, ensure_ascii=False, indent=2) if arguments.json else in_locale(table(status)))
    if not done:
        begun, follows = (
            "The move to the GPU has begun / 已开始加载到 GPU",
            "The operation follows the running request or load / 将在当前请求或加载结束后执行",
        )
        print(in_locale(begun if arguments.command == "warm" else follows), file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m gpu_manager",
        description="Control a running app.",
        epilog="python -m gpu_manager speak --help: speak a text; infer --help: clone or edit a recording",
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=["status", "offload", "release", "warm", "configure"])
    parser.add_argument("model", nargs="?", help="the model's name, such as tts (default: all)")
    add_url(parser)
    add_secret(parser, "--token", os.environ.get("GPU_CONTROL_TOKEN"), "or GPU_CONTROL_TOKEN")
    parser.add_argument("--keep-warm", metavar="S", help="for configure: 30s, 5m, auto, -1 (for ever)")
    parser.add_argument("--idle-timeout", metavar="S", help="for configure: 600, 15m, -1 (never)")
    parser.add_argument("--json", action="store_true", help="print the whole status as JSON")
    return parser


def _call(arguments: argparse.Namespace) -> tuple[bool, Status]:
    """Sends the command; returns whether it is done, and the status."""
    request = urllib.request.Request(f"{arguments.url.rstrip('/')}/gpu/{arguments.command}")
    if arguments.command != "status":
        asked = {"model": arguments.model, "keep_warm": arguments.keep_warm, "idle_timeout": arguments.idle_timeout}
        request.data = json.dumps({name: value for name, value in asked.items() if value is not None}).encode()
        request.add_header("Content-Type", "application/json")
    with opened(request, arguments.token) as answer:
        status: Status = json.load(answer)
        if not isinstance(status, dict) or not {"device", "models"} <= status.keys():
            raise ValueError("another program answers")
    if arguments.command == "status" and (name := arguments.model) is not None:
        if name not in status["models"]:
            raise UnknownModel(name, tuple(status["models"]))
        status["models"] = {name: status["models"][name]}
    return answer.status == 200, status


def _reason(error: Exception, url: str) -> str:
    """Describes a failed call, in English and Chinese."""
    if isinstance(error, UnknownModel):
        return str(error)
    if isinstance(error, urllib.error.HTTPError):
        with suppress(ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
            return str(json.load(error)["error"])
        if error.code not in (404, 405):
            return f"{error.url}: {error.code} {error.reason}"
        return (
            f"There is no GPU management at {error.url}: start the app with --enable-gpu-management, or give --url / "
            f"{error.url} 没有 GPU 管理：请在启动应用时加上 --enable-gpu-management，或用 --url 指定地址"
        )
    return untrusted(error, url) or (
        f"No app with GPU management answers at {url} ({error}): start one, or give --url / "
        f"{url} 没有启用 GPU 管理的应用：请先启动，或用 --url 指定地址"
    )


def table(status: Status) -> str:
    """Formats the device's name, a line for each model, and remarks below them."""
    rows = [("MODEL", "STATE", "GPU", "MAIN MEMORY", "IDLE S", "WAITING", "NEXT")]
    for name, model in status["models"].items():
        idle = "-" if model["idle_s"] is None else f"{model['idle_s']:.0f}"
        sizes = readable_bytes(model["device_bytes"]), readable_bytes(model["host_bytes"])
        rows.append((name, model["state"], *sizes, idle, str(model["waiting"]), _next(model)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    below = [
        f"{name}: {sentence}"
        for name, model in status["models"].items()
        for sentence in (holder_of(model), *remarks(model))
        if sentence
    ]
    return "\n".join([status["device"]["name"], *lines, *below])


def _next(model: ModelStatus) -> str:
    """Describes the next move: requested, in progress, or planned by the policy."""
    if model["pending"]:
        return f"{model['pending']} after the {'request' if model['leases'] or model['waiting'] else 'load'}"
    if way := model["progress"]:
        return f"to {way['to']}: {way['phase']}"
    return f"{model['next']['to']} in {model['next']['in_s']:.0f} s" if model["next"] else "-"
