"""Settings of the launcher, from: flag, GPU_TTS_NAME, NAME, last start, default."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .terminal import choose, fail, quoted

HERE = str(Path(__file__).absolute().parents[2])
"""Folder of this program."""
ACTIONS = ("start", "stop", "restart", "status", "logs")
OF_APP = ("GPU_CONTROL_TOKEN", "GRADIO_AUTH", "GPU_TTS_ROOT_PATH", "GRADIO_ROOT_PATH", "GPU_TTS_ALLOWED_HOSTS")
"""Variables of app.py; also passed to a container."""
PUBLIC = (*OF_APP, "CUDA_VISIBLE_DEVICES", "TORCH_INDEX_URL")
"""Variables without a prefix: also those of CUDA and of the installation."""
LAST_START = "last start"
_ALIASES = {"SERVER_NAME": "HOST", "SERVER_PORT": "PORT"}  # names in app.py
_ADDRESS = r"localhost|[0-9.]+|\[?[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*\]?"


def _setting(default: Any, en: str = "", zh: str = "") -> Any:
    """Returns a field with its help texts. Default "": none, or computed by `settle`."""
    return field(default=default, metadata={"en": en, "zh": zh})


@dataclass(frozen=True)
class LaunchSettings:
    """Settings of the launcher; times in seconds, folders given by the user absolute."""

    action: str
    check: bool
    arguments: tuple[str, ...]
    """Arguments of app.py."""
    script: str
    """Name of this program in messages."""
    sources: Mapping[str, str]
    """By setting, in capitals: its flag or variable, or `LAST_START`."""

    host: str = _setting("127.0.0.1", "address to listen on (127.0.0.1)", "监听地址（127.0.0.1）")
    port: int = _setting(7860, "port (7860)", "端口（7860）")
    gpu_id: str = _setting("", "GPU as nvidia-smi numbers it, or none (most free memory)",
                           "使用哪块 GPU（nvidia-smi 的编号）或 none（空闲显存最多的）")  # fmt: skip
    gpu_idle_timeout: str = _setting("600", "idle this long: released: 600, 90s, 15m, 1h, -1 (600)",
                                     "空闲多久后完全释放：600、90s、15m、1h、-1（600）")  # fmt: skip
    gpu_keep_warm: str = _setting("0", "stay on the GPU this long after a request, or auto (0)",
                                  "请求后在 GPU 上保留多久，或 auto（0）")  # fmt: skip
    gpu_snapshot_dir: str = _setting("", "released weights are kept here (none)", "已释放的权重保存在此（无）")
    model_path: str = _setting("", "weights of Step-Audio-EditX (none: built-in engine)",
                               "Step-Audio-EditX 的权重目录（不设则用内置引擎）")  # fmt: skip
    step_audio_root: str = _setting("", "checkout of Step-Audio-EditX", "Step-Audio-EditX 的代码目录")
    project_dir: str = _setting("", "folder of app.py (this script's)", "app.py 所在目录（本脚本所在目录）")
    venv_dir: str = _setting("", "Python environment (PROJECT_DIR/.venv); your own one is never changed",
                             "Python 环境（PROJECT_DIR/.venv）；您自己创建的环境不会被改动")  # fmt: skip
    detach: bool = _setting(False, "run in the background; returns once it is ready", "后台运行，就绪后返回")
    run_dir: str = _setting("", "log and pid of what runs (PROJECT_DIR/.run)", "日志与进程号（PROJECT_DIR/.run）")
    ready_timeout: int = _setting(300, "wait this many seconds for it (300)", "等待就绪的秒数（300）")
    stop_timeout: int = _setting(60, "wait this many seconds for its end (60)", "等待退出的秒数（60）")
    follow: bool = _setting(False)
    docker: bool = _setting(False, "in a container", "在容器中运行")
    container_name: str = _setting("step-audio-gpu-managed", "its name (step-audio-gpu-managed)",
                                   "容器名（step-audio-gpu-managed）")  # fmt: skip
    replace: bool = _setting(False, "put it in the place of one of that name", "替换同名容器")
    image: str = _setting("gpu-managed-tts", "name of the image (gpu-managed-tts)", "镜像名（gpu-managed-tts）")
    base_image: str = _setting(
        "python:3.11-slim-bookworm",
        "image to build on (python:3.11-slim-bookworm); for the real engine that of a checkout",
        "基础镜像（python:3.11-slim-bookworm）；真实引擎请用 Step-Audio-EditX 的镜像",
    )

    def named(self, name: str) -> str:
        """Formats a setting for messages, with its value and source."""
        return named(name, str(getattr(self, name.lower())), self.sources.get(name, ""))

    def command(self, action: str) -> str:
        """Returns the command for an action on this app, unambiguous and valid in any folder."""
        words = [self.script, action, "--port", str(self.port)]
        if self.docker:
            words = [self.script, action, "--docker", "--container-name", self.container_name]
        elif self.run_dir != f"{self.project_dir}/.run":
            words += ["--run-dir", self.run_dir]
        return quoted([*words, *([] if self.project_dir == HERE else ["--project-dir", self.project_dir])])


SETTINGS = {each.name.upper(): each for each in fields(LaunchSettings) if each.metadata}
_REMEMBERED = {"HOST", "GPU_ID", "GPU_IDLE_TIMEOUT", "GPU_KEEP_WARM", "GPU_SNAPSHOT_DIR", "MODEL_PATH",
               "STEP_AUDIO_ROOT", "PROJECT_DIR", "VENV_DIR", "DETACH"}  # fmt: skip
REMEMBERED = _REMEMBERED | set(PUBLIC)
"""Settings reused by `restart`, besides the arguments of app.py."""


@dataclass(frozen=True)
class Given:
    """Settings from the command line and the environment: texts and sources, by name."""

    action: str
    check: bool
    arguments: tuple[str, ...]
    texts: Mapping[str, str]
    sources: Mapping[str, str]

    def has(self, name: str) -> bool:
        return bool(self.texts.get(name))


def named(name: str, text: str, source: str) -> str:
    if source == LAST_START:
        said = choose(" (of the last start)", "（来自上次启动）")
    elif source.startswith("-"):
        said = choose(f" ({source})", f"（{source}）")
    else:
        said = choose(f" (variable {source})", f"（环境变量 {source}）") if source else ""
    return f"{name} '{text}'{said}"


def read(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Given:
    """Parses the command line; passes unknown words to app.py. Raises `LaunchError`."""
    words, action, check = list(argv), "start", False
    arguments: list[str] = []
    texts: dict[str, str] = {}
    sources: dict[str, str] = {}
    if words and not words[0].startswith("-"):
        action = words.pop(0)
        if action not in ACTIONS:
            fail(f"There is no action '{action}': {', '.join(ACTIONS)}; see --help",
                 f"没有操作 '{action}'：可用 {'、'.join(ACTIONS)}；参见 --help")  # fmt: skip
    while words:
        word = words.pop(0)
        flag, equals, text = word.partition("=")
        name = flag[2:].upper().replace("-", "_") if flag.startswith("--") else ""
        name = _ALIASES.get(name, name)
        if word == "--check":
            check = True
        elif name not in SETTINGS:
            arguments.append(word)
        else:
            if isinstance(SETTINGS[name].default, bool):
                if equals:
                    fail(f"{flag} takes no value", f"{flag} 不带值")
                text = "1"
            elif not equals:
                if not words or words[0].startswith("--"):
                    fail(f"{flag} needs a value", f"{flag} 需要一个值")
                text = words.pop(0)
            texts[name], sources[name] = text, flag
    if arguments and action not in ("start", "restart"):
        fail(f"{action} does not know {arguments[0]}; see --help", f"{action} 不支持 {arguments[0]}；参见 --help")
    if check and action != "start":
        fail("--check goes with start", "--check 仅用于 start")
    _read_variables(environ, texts, sources)
    for name in ("GPU_SNAPSHOT_DIR", "STEP_AUDIO_ROOT", "VENV_DIR", "MODEL_PATH", "PROJECT_DIR", "RUN_DIR"):
        if texts.get(name):
            texts[name] = _folder(name, texts[name])
    return Given(action, check, tuple(arguments), texts, sources)


def _read_variables(environ: Mapping[str, str], texts: dict[str, str], sources: dict[str, str]) -> None:
    """Reads variables. Ignores two that other programs set, without the prefix, in some cases.

    HOST (set by shells and conda's compilers) needs to be an address; CONTAINER_NAME (set by sandboxes) needs DOCKER.
    """
    flags = set(texts)
    for name in sorted(SETTINGS, key="CONTAINER_NAME".__eq__):  # last, since it depends on DOCKER
        ours = (
            (name != "HOST" or re.fullmatch(_ADDRESS, environ.get("HOST", "")))
            and (name != "CONTAINER_NAME" or texts.get("DOCKER") == "1")
        )  # fmt: skip
        for variable in (f"GPU_TTS_{name}", *([name] if ours else [])):
            if name not in flags and name not in texts and environ.get(variable):
                texts[name], sources[name] = environ[variable], variable


def _folder(name: str, text: str) -> str:
    """Makes a path absolute, for restarts and containers; leaves a MODEL_PATH that may be a hub id."""
    if name == "MODEL_PATH" and not text.startswith("~/") and not os.path.isdir(text):
        return text
    return absolute(text)


def absolute(path: str) -> str:
    """Makes a path absolute; expands ``~``, which shells leave unexpanded after ``=``."""
    return os.path.join(os.getcwd(), os.path.expanduser(path))


def settle(given: Given, script: str, remembered: Mapping[str, str] | None = None) -> LaunchSettings:
    """Computes all settings; raises `LaunchError` for a value of the wrong type."""
    remembered = remembered or {}
    sources = dict(given.sources)
    values: dict[str, Any] = {}
    for name, each in SETTINGS.items():
        if name in given.texts:
            text = given.texts[name]
        elif text := remembered.get(name, ""):
            sources[name] = LAST_START
        values[each.name] = _converted(name, text, each.default, sources) if text else each.default
    project = values["project_dir"] = values["project_dir"] or HERE
    values["run_dir"] = values["run_dir"] or f"{project}/.run"
    values["venv_dir"] = values["venv_dir"] or f"{project}/.venv"
    return LaunchSettings(given.action, given.check, given.arguments, script, sources, **values)


def _converted(name: str, text: str, default: object, sources: Mapping[str, str]) -> object:
    what = named(name, text, sources.get(name, ""))
    if isinstance(default, bool):
        if text not in ("0", "1"):
            fail(f"{what} is neither 1 nor 0", f"{what} 应为 1 或 0")
        return text == "1"
    if name == "PORT":
        if not re.fullmatch("[1-9][0-9]{0,4}", text) or int(text) > 65535:
            fail(f"{what} is no port: give 1 to 65535", f"{what} 不是有效端口：请写 1 到 65535")
        return int(text)
    if isinstance(default, int):
        if not re.fullmatch("[1-9][0-9]{0,6}", text):
            fail(f"{what} is no number of seconds: give 1 or more", f"{what} 不是秒数：请写 1 或更大的整数")
        return int(text)
    return text
