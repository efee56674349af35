"""Settings of the launcher, from: flag, GPU_TTS_NAME, NAME, last start, default; and the text of ``--help``."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..addresses import link
from .terminal import choose, fail

THIS_PROJECT = str(Path(__file__).absolute().parents[2])
"""Folder of this program."""
ACTIONS = ("start", "stop", "restart", "status", "logs")
OF_APP = ("GPU_CONTROL_TOKEN", "GRADIO_AUTH", "GPU_TTS_ROOT_PATH", "GRADIO_ROOT_PATH", "GPU_TTS_ALLOWED_HOSTS",
          "GPU_TTS_API_KEYS", "GPU_TTS_CORS_ORIGINS")  # fmt: skip
"""Variables of app.py; also passed to a container."""
PUBLIC = (*OF_APP, "GPU_TTS_VOICES_DIR", "CUDA_VISIBLE_DEVICES", "TORCH_INDEX_URL")
"""Variables without a prefix: also those of CUDA and of the installation."""
LAST_START = "last start"
_ALIASES = {"SERVER_NAME": "HOST", "SERVER_PORT": "PORT"}  # names in app.py
_FOLDERS = {"GPU_SNAPSHOT_DIR", "STEP_AUDIO_ROOT", "VENV_DIR", "MODEL_PATH", "PROJECT_DIR", "RUN_DIR"}
_REMEMBERED = {"HOST", "GPU_ID", "GPU_IDLE_TIMEOUT", "GPU_KEEP_WARM", "GPU_SNAPSHOT_DIR", "GPU_ISOLATION",
               "GPU_RESIDUE", "MODEL_PATH", "STEP_AUDIO_ROOT", "PROJECT_DIR", "VENV_DIR", "DETACH"}  # fmt: skip
_TO_APP = {"host": "--server-name", "port": "--server-port"} | {
    name: "--" + name.replace("_", "-")
    for name in ("gpu_idle_timeout", "gpu_keep_warm", "gpu_snapshot_dir", "gpu_isolation",
                 "gpu_residue", "model_path", "step_audio_root")
}  # fmt: skip
_ADDRESS = r"localhost|[0-9.]+|\[?[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*\]?"


def _setting(default: Any, en: str = "", zh: str = "") -> Any:
    """Returns a field with its help texts. Default "": none, or computed by `read`."""
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
    """By setting, in capitals: its flag or variable, or `LAST_START`; no entry for a default."""

    host: str = _setting("127.0.0.1", "address to listen on (127.0.0.1)", "监听地址（127.0.0.1）")
    port: int = _setting(7860, "port (7860)", "端口（7860）")
    gpu_id: str = _setting("", "number of the GPU in nvidia-smi, or none (the GPU with the most free memory)",
                           "GPU 编号（同 nvidia-smi），或 none（默认选空闲显存最多的）")  # fmt: skip
    gpu_idle_timeout: str = _setting("600", "release the model after this idle time: 600, 90s, 15m, 1h, -1 (600)",
                                     "空闲多久后完全释放：600、90s、15m、1h、-1（600）")  # fmt: skip
    gpu_keep_warm: str = _setting("0", "keep the model on the GPU this long after a request, or auto (0)",
                                  "请求后在 GPU 上保留多久，或 auto（0）")  # fmt: skip
    gpu_snapshot_dir: str = _setting(
        "", "folder for snapshots of released weights (none)", "已释放权重的保存目录（无）"
    )
    gpu_isolation: str = _setting(
        "", "process: each model in a process of its own, of which a release leaves nothing on the GPU (none)",
        "process：每个模型在独立的进程中运行，释放后 GPU 上不留任何内容（none）",
    )  # fmt: skip
    gpu_residue: str = _setting(
        "", "with process: keep, checkpoint or auto, what becomes of the rest on the GPU after an offload (auto)",
        "用于 process：keep、checkpoint 或 auto，卸载后 GPU 上的剩余内容如何处理（auto）",
    )  # fmt: skip
    model_path: str = _setting("", "weights of Step-Audio-EditX (none: built-in engine)",
                               "Step-Audio-EditX 的权重目录（不设则用内置引擎）")  # fmt: skip
    step_audio_root: str = _setting("", "checkout of Step-Audio-EditX", "Step-Audio-EditX 的代码目录")
    project_dir: str = _setting("", "folder of app.py (that of this script)", "app.py 所在目录（默认为本脚本所在目录）")
    venv_dir: str = _setting("", "Python environment (PROJECT_DIR/.venv); one of your own is never changed",
                             "Python 环境（PROJECT_DIR/.venv）；您自己创建的环境不会被改动")  # fmt: skip
    detach: bool = _setting(False, "run in the background; return once the app is ready", "后台运行，就绪后返回")
    run_dir: str = _setting("", "folder for log and pid (PROJECT_DIR/.run)", "日志与进程号的目录（PROJECT_DIR/.run）")
    ready_timeout: int = _setting(300, "seconds to wait until the app is ready (300)", "等待就绪的秒数（300）")
    stop_timeout: int = _setting(60, "seconds to wait until the app has ended (60)", "等待退出的秒数（60）")
    follow: bool = _setting(False)
    docker: bool = _setting(False, "run in a container", "在容器中运行")
    container_name: str = _setting("step-audio-gpu-managed", "name of the container (step-audio-gpu-managed)",
                                   "容器名（step-audio-gpu-managed）")  # fmt: skip
    replace: bool = _setting(False, "replace the container of that name", "替换同名容器")
    image: str = _setting("gpu-managed-tts", "name of the image (gpu-managed-tts)", "镜像名（gpu-managed-tts）")
    base_image: str = _setting(
        "python:3.11-slim-bookworm",
        "base of the image (python:3.11-slim-bookworm); for the real engine, the image of a checkout",
        "基础镜像（python:3.11-slim-bookworm）；真实引擎请用 Step-Audio-EditX 的镜像",
    )

    def given(self, name: str) -> bool:
        """Returns whether a flag or a variable sets it now."""
        return self.sources.get(name, LAST_START) != LAST_START

    def named(self, name: str) -> str:
        """Formats a setting for messages, with its value and source."""
        return _named(name, str(getattr(self, name.lower())), self.sources.get(name, ""))

    def app_argument(self, flag: str) -> str:
        """Returns the value of an argument of app.py; empty if it is not given."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument(flag, dest="value", nargs="?", default="")
        return str(parser.parse_known_args(self.arguments)[0].value or "")

    def app_arguments(self) -> list[str]:
        """Returns the command line of app.py."""
        values = ((flag, str(getattr(self, name))) for name, flag in _TO_APP.items())
        words = (word for flag, value in values if value for word in (flag, value))
        return ["--enable-gpu-management", *self.arguments, *words]

    def url(self, tls: bool = False) -> str:
        """Returns the app's URL; ``tls`` forces https, which is otherwise derived from the arguments."""
        return link(self.host, self.port, "https" if tls or self.app_argument("--ssl-certfile") else "http")

    def command(self, action: str) -> str:
        """Returns the command for an action on this app, unambiguous and valid in any folder."""
        words = [self.script, action, "--port", str(self.port)]
        if self.docker:
            words = [self.script, action, "--docker", "--container-name", self.container_name]
        elif self.run_dir != f"{self.project_dir}/.run":
            words += ["--run-dir", self.run_dir]
        return shlex.join([*words, *([] if self.project_dir == THIS_PROJECT else ["--project-dir", self.project_dir])])

    def remembered(self) -> dict[str, str]:
        """Returns the settings and variables that `restart` reuses, before automatic choices."""
        texts = {name: str(getattr(self, name.lower())) for name in _REMEMBERED} | {"DETACH": str(int(self.detach))}
        return texts | {name: os.environ[name] for name in PUBLIC if name in os.environ}


SETTINGS = {each.name.upper(): each for each in fields(LaunchSettings) if each.metadata}
OF_FLAG = {flag: name.upper() for name, flag in _TO_APP.items()}
"""Setting, in capitals, by the flag of app.py that it is passed as."""


def read(
    argv: Sequence[str],
    script: str,
    environ: Mapping[str, str] = os.environ,
    remembered: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
) -> LaunchSettings:
    """Reads settings; raises `LaunchError` for a value of the wrong type.

    ``remembered`` and ``arguments`` are those of the last start; new arguments follow them.
    """
    words = list(argv)
    action = words.pop(0) if words and not words[0].startswith("-") else "start"
    if action not in ACTIONS:
        fail(f"There is no action '{action}': {', '.join(ACTIONS)}; see --help",
             f"没有操作 '{action}'：可用 {'、'.join(ACTIONS)}；参见 --help")  # fmt: skip
    check = "--check" in words
    given, others = _flags(word for word in words if word != "--check")
    if others and action not in ("start", "restart"):
        fail(f"{action} does not know {others[0]}; see --help", f"{action} 不支持 {others[0]}；参见 --help")
    if check and action != "start":
        fail("--check is only for start", "--check 仅用于 start")
    _add_variables(given, environ)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, each in SETTINGS.items():
        text, source = given.get(name) or ((remembered or {}).get(name, ""), LAST_START)
        values[each.name] = _converted(name, text, source, each.default) if text else each.default
        if text:
            sources[name] = source
    project = values["project_dir"] = values["project_dir"] or THIS_PROJECT
    values["run_dir"] = values["run_dir"] or f"{project}/.run"
    values["venv_dir"] = values["venv_dir"] or f"{project}/.venv"
    return LaunchSettings(action, check, (*arguments, *others), script, sources, **values)


def _flags(argv: Iterable[str]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Returns the text and the flag of each setting, and the other words, which are arguments of app.py."""
    words, given, others = list(argv), {}, []
    while words:
        word = words.pop(0)
        flag, equals, text = word.partition("=")
        name = flag[2:].upper().replace("-", "_") if flag.startswith("--") else ""
        name = _ALIASES.get(name, name)
        if name not in SETTINGS:
            others.append(word)
            continue
        if isinstance(SETTINGS[name].default, bool):
            if equals:
                fail(f"{flag} takes no value", f"{flag} 不带值")
            text = "1"
        elif not equals:
            if not words or words[0].startswith("--"):
                fail(f"{flag} needs a value", f"{flag} 需要一个值")
            text = words.pop(0)
        given[name] = text, flag
    return given, others


def _add_variables(given: dict[str, tuple[str, str]], environ: Mapping[str, str]) -> None:
    """Adds settings from variables. Ignores two that other programs set, without the prefix, in some cases.

    HOST (set by shells and conda's compilers) needs to be an address; CONTAINER_NAME (set by sandboxes) needs DOCKER,
    which is read before it.
    """
    for name in SETTINGS:
        ours = (
            (name != "HOST" or re.fullmatch(_ADDRESS, environ.get("HOST", "")))
            and (name != "CONTAINER_NAME" or given.get("DOCKER", ("",))[0] == "1")
        )  # fmt: skip
        for variable in (f"GPU_TTS_{name}", *([name] if ours else [])):
            if name not in given and environ.get(variable):
                given[name] = environ[variable], variable


def is_url(path: str) -> bool:
    """Whether a path is the URL of an object store, which containers reach without a mount."""
    return "://" in path


def absolute(path: str) -> str:
    """Makes a path absolute, for restarts and containers; expands ``~``, which shells leave unexpanded after ``=``.

    Returns URLs unchanged.
    """
    if is_url(path):
        return path
    return os.path.join(os.getcwd(), os.path.expanduser(path))


def _named(name: str, text: str, source: str) -> str:
    if source == LAST_START:
        return choose(f"{name} '{text}' (of the last start)", f"{name} '{text}'（来自上次启动）")
    if not source:
        return f"{name} '{text}'"
    variable = "" if source.startswith("-") else choose("variable ", "环境变量 ")
    return choose(f"{name} '{text}' ({variable}{source})", f"{name} '{text}'（{variable}{source}）")


def _converted(name: str, text: str, source: str, default: object) -> object:
    if isinstance(default, bool):
        pattern, en, zh = "[01]", "is neither 1 nor 0", "应为 1 或 0"
    elif name == "PORT":
        pattern, en, zh = "[1-9][0-9]{0,4}", "is not a valid port: give 1 to 65535", "不是有效端口：请写 1 到 65535"
    elif isinstance(default, int):
        pattern, en, zh = (
            "[1-9][0-9]{0,6}",
            "is not a valid number of seconds: give 1 or more",
            "不是有效的秒数：请写 1 或更大的整数",
        )
    elif name in _FOLDERS and (name != "MODEL_PATH" or text.startswith("~/") or os.path.isdir(text)):
        return absolute(text)  # another MODEL_PATH may be a hub id
    else:
        return text.strip("[]") if name == "HOST" else text
    if not re.fullmatch(pattern, text) or (name == "PORT" and int(text) > 65535):
        what = _named(name, text, source)
        fail(f"{what} {en}", f"{what} {zh}")
    return text == "1" if isinstance(default, bool) else int(text)


_USAGE = (
"""\
Usage: start_with_gpu_management.sh [start|stop|restart|status|logs] [--name value]... [arguments of app.py]...

  start      start the app, in this terminal or, with --detach, in the background
  stop       stop the app; a container that it replaced gets its name back
  restart    restart with the settings of the last start and those given now; if this fails, start the old app again
  status     show the app and its models; exit code 3 if it does not run
  logs       show the last lines of the log; --follow continues

Without --port, the actions apply to the only running app. If several run, the script lists them and fails.
A setting is read from its flag, the variable GPU_TTS_NAME or the variable NAME. DOCKER, DETACH, REPLACE and FOLLOW take
the value 1. Without the prefix, HOST counts only if it is an address or localhost, CONTAINER_NAME only with --docker.

{rows}
  --check                                       show what a start would do; do nothing
  --help                                        show this text; for arguments of app.py: python app.py --help

pip's variables work as usual; for an image, only PIP_INDEX_URL and PIP_EXTRA_INDEX_URL. TORCH_INDEX_URL is the index
for PyTorch alone: https://download.pytorch.org/whl/cpu saves several GB without a GPU.""",
"""\
用法：start_with_gpu_management.sh [start|stop|restart|status|logs] [--名称 值]... [app.py 的参数]...

  start      启动应用，在本终端或后台（--detach）
  stop       停止应用；被它替换的容器恢复原名
  restart    按上次的设置重启，可另给新设置；失败时恢复原来运行的应用
  status     显示应用与模型的状态；未运行时返回 3
  logs       显示最后的日志；--follow 持续显示

不写 --port 时，操作针对唯一正在运行的应用；若有多个，则列出它们并返回失败。
每项设置依次取自参数、环境变量 GPU_TTS_名称、环境变量 名称；DOCKER、DETACH、REPLACE、FOLLOW 的变量值为 1。
不带前缀时，HOST 仅在其值为地址或 localhost 时有效，CONTAINER_NAME 仅与 --docker 一起使用时有效。

{rows}
  --check                                       只说明将做什么，不执行
  --help                                        显示本说明；app.py 的参数见 python app.py --help

pip 的环境变量照常生效；构建镜像时，仅 PIP_INDEX_URL 和 PIP_EXTRA_INDEX_URL 有效。
TORCH_INDEX_URL 仅用于 PyTorch：没有 GPU 时设为 https://download.pytorch.org/whl/cpu 可少下载数 GB。""",
)  # fmt: skip


def usage() -> str:
    """Returns the text of ``--help`` in the language of the terminal."""
    rows = [
        f"  {'--' + name.lower().replace('_', '-'):<19} {'GPU_TTS_' + name:<25} {choose(**setting.metadata)}"
        for name, setting in SETTINGS.items()
        if setting.metadata["en"]
    ]
    return choose(*_USAGE).format(rows="\n".join(rows))
