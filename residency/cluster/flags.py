"""The flags in deploy/ray_serve.yaml: those of app.py that have an effect on Ray Serve."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Iterable
from dataclasses import fields

from ..errors import InvalidInput
from ..launch.settings import ENGINE_FLAGS, Settings, parse

API = frozenset({
    "allowed_hosts", "api_keys", "control_token", "cors_origins", "max_audio", "max_disk", "max_requests", "max_text",
    "max_upload", "tmp_dir", "voices_dir",
})  # fmt: skip
ENGINE = frozenset({"simulate_gpu", "tmp_dir"} | {each.name for each in fields(Settings) if each.name[:4] == "gpu_"})
MODEL = frozenset({
    *ENGINE_FLAGS, "engine", "model_path", "model_source", "tts_model_id", "step_audio_root", "gpu_idle_timeout",
    "gpu_keep_warm", "gpu_load_timeout",
})  # fmt: skip
"""Names of settings, see `Settings`."""


def parsed(*lines: str, files_here: bool = True) -> Settings:
    """Returns the settings of flags; raises `InvalidInput`, whose text has no value of a flag that is unknown."""
    printed = io.StringIO()
    try:
        words = [word for line in lines for word in shlex.split(line)]
    except ValueError as error:
        raise InvalidInput(f"Wrong flags: {error}", f"参数错误：{error}") from None
    try:
        with contextlib.redirect_stderr(printed):
            return parse(words, files_here=files_here)
    except SystemExit:
        reason = printed.getvalue().rpartition("error: ")[2].strip()
        if reason.startswith("unrecognized arguments"):  # with their values, which may be secret
            reason = f"unknown: {' '.join(_names(reason.split())) or 'a word that is no flag'}"
        raise InvalidInput(f"Wrong flags: {reason}", f"参数错误：{reason}") from None


def check(where: str, line: str, effective: frozenset[str], *, files_here: bool = True) -> None:
    """Raises `InvalidInput` if flags are wrong, or others than those of the ``effective`` settings.

    ``where``: names the place for the message.
    """
    try:
        settings = parsed(line, "--enable-gpu-management", files_here=files_here)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error.en}", f"{where}：{error.zh}") from None
    flags = {_flag(name) for name in effective}
    others = [name for name in _names(shlex.split(line)) if name.replace("--no-", "--", 1) not in flags]
    if effective is API and settings.auth and "--auth" not in others:
        others.append("--auth (GRADIO_AUTH)")
    if settings.engine == "ray":
        others.append("--engine ray")
    if others:
        raise InvalidInput(
            f"{where}: {', '.join(others)} has no effect on Ray Serve: leave it out. Flags here: "
            f"{' '.join(sorted(flags))}",
            f"{where}：{'、'.join(others)} 在 Ray Serve 上无效，请去掉。此处可用的参数：{' '.join(sorted(flags))}",
        )


def _names(words: Iterable[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def _flag(name: str) -> str:
    metadata = next(each.metadata for each in fields(Settings) if each.name == name)
    return str(metadata.get("flag", "--" + name.replace("_", "-")))
