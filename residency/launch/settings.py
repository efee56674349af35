"""Settings of app.py, from the command line and the environment; validated before models load.

Flags of the Step-Audio-EditX app keep their names, choices and defaults. Imports little, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import urlsplit

from ..addresses import is_address, without_mapping
from ..errors import InvalidInput
from ..scheduling.policies import keep_warm_seconds, seconds
from ..units import UNITS_BYTES
from .certificates import check_certificate

T = TypeVar("T")

_LARGEST_BYTES = 1 << 60
_HUB_OWNER = r"[A-Za-z0-9][\w.-]*"
_ADDRESS = r"(https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(:(?P<port>\d+))?)?(?P<path>(/[A-Za-z0-9._~!$&'()*+,;=:@-]+)*)"
#: Invalid as root paths: ambiguous behind a proxy that removes the root path.
_OWN_PATHS = {"assets", "config", "docs", "gpu", "gradio_api", "healthz", "login", "logout", "metrics", "openapi.json",
              "readyz", "static", "svelte", "theme.css"}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Flags of ``app.py``; times in seconds (`math.inf`: never), sizes in bytes."""

    model_path: str | None = None
    server_name: str = "0.0.0.0"
    server_port: int = 7860
    tmp_dir: str = "/tmp/gradio"
    share: bool = False
    model_source: str = "auto"
    tokenizer_model_id: str = "dengcunqin/speech_paraformer-large_asr_nat-zh-cantonese-en-16k-vocab8501-online"
    tts_model_id: str | None = None
    quantization: str | None = None
    torch_dtype: str = "bfloat16"
    device_map: str = "cuda"
    enable_auto_transcribe: bool = False
    asr_model: str | None = None
    enable_gpu_management: bool = False
    gpu_idle_timeout: float = 600.0
    gpu_keep_warm: float | Literal["auto"] = 0.0
    gpu_budget: int | None = None
    gpu_load_timeout: float = math.inf
    gpu_wait_timeout: float = 600.0
    engine: Literal["builtin", "step-audio"] = "builtin"
    step_audio_root: str | None = None
    gpu_snapshot_dir: str | None = None
    gpu_snapshot_limit: int | None = None
    gpu_host_memory_limit: int | None = None
    simulate_gpu: int | None = None
    control_token: str | None = field(default=None, repr=False)
    auth: tuple[str, str] | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    root_path: str = ""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    max_upload: int = 100 << 20
    max_disk: int = 5 << 30
    max_audio: float = 600.0
    max_text: int = 5000
    shutdown_grace: float = 10.0


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Settings:
    """Parses flags, which override the environment. Exits with code 2 and a message if a value is invalid."""
    parser = _parser(environ)
    values = vars(parser.parse_args(argv))
    if values.pop("gpu_isolation") != "none":
        parser.error("--gpu-isolation process is not available yet; leave it out. / --gpu-isolation 尚未提供，请去掉。")
    if values["simulate_gpu"] is not None and not values["enable_gpu_management"]:
        parser.error(
            "--simulate-gpu needs --enable-gpu-management; add it or leave --simulate-gpu out. / "
            "--simulate-gpu 需要与 --enable-gpu-management 一起使用。"
        )
    if (model := values["asr_model"]) is not None:
        if not values["enable_auto_transcribe"]:
            parser.error(
                "--asr-model needs --enable-auto-transcribe; add it or leave --asr-model out. / "
                "--asr-model 需要与 --enable-auto-transcribe 一起使用。"
            )
        if model.startswith(("/", ".", "~")) and not Path(model).is_dir():
            parser.error(
                f"--asr-model {model} is no folder: give one with a model, or the id of one on a hub "
                f"(openai/whisper-small). / --asr-model {model} 不是目录：请指定模型目录或模型仓库 ID。"
            )
    try:
        allowed = values.pop("allowed_host") or [_names(environ.get("GPU_TTS_ALLOWED_HOSTS", ""))]
    except InvalidInput as error:
        parser.error(f"GPU_TTS_ALLOWED_HOSTS: {error}")
    values["allowed_hosts"] = tuple(name for names in allowed for name in names)
    if values["engine"] == "auto":
        values["engine"] = "step-audio" if values["model_path"] else "builtin"
    try:
        check_certificate(values["ssl_certfile"], values["ssl_keyfile"])
        if values["engine"] == "step-audio":
            _check_model_path(values["model_path"], values["model_source"])
    except InvalidInput as error:
        parser.error(str(error))
    return Settings(**values)


def _check_model_path(model_path: str | None, source: str) -> None:
    """Raises `InvalidInput` if local weights are missing; accepts a possible hub id unless the source is local."""
    if model_path is None:
        raise InvalidInput(
            "--engine step-audio needs --model-path, the folder with Step-Audio-Tokenizer and Step-Audio-EditX; "
            "leave --engine out to use the built-in engine",
            "--engine step-audio 需要 --model-path（包含 Step-Audio-Tokenizer 和 Step-Audio-EditX 的目录）；"
            "不写 --engine 则使用内置引擎",
        )
    if source in ("huggingface", "modelscope") and Path(model_path).is_absolute():
        raise InvalidInput(
            f"--model-path {model_path} is a folder, and --model-source {source} takes the id of a hub: leave "
            f"--model-source out, or give an id (stepfun-ai)",
            f"--model-path {model_path} 是目录，而 --model-source {source} 需要模型仓库 ID：请去掉 --model-source，"
            f"或给出 ID（stepfun-ai）",
        )
    may_be_an_id = source == "auto" and re.fullmatch(_HUB_OWNER, model_path)
    if source in ("auto", "local") and not may_be_an_id and not Path(model_path).exists():
        raise InvalidInput(
            f"--model-path {model_path} does not exist. Download stepfun-ai/Step-Audio-Tokenizer and "
            f"stepfun-ai/Step-Audio-EditX into it (hf download), give --model-source huggingface or "
            f"modelscope if it is the id of a hub, or leave --model-path out to use the built-in engine",
            f"--model-path {model_path} 不存在。请把 stepfun-ai/Step-Audio-Tokenizer 和 stepfun-ai/Step-Audio-EditX "
            f"下载到其中；如果它是模型仓库的 ID，请加上 --model-source huggingface 或 modelscope；"
            f"不写 --model-path 则使用内置引擎",
        )


def _parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        description="Step-Audio-EditX in the browser; its model is off the GPU while nobody speaks.",
        allow_abbrev=False,
    )
    _add_page_flags(parser, defaults, environ)
    _add_management_flags(parser, defaults, environ)
    return parser


def _add_page_flags(parser: argparse.ArgumentParser, defaults: Settings, environ: Mapping[str, str]) -> None:
    add = parser.add_argument_group("as in the Step-Audio-EditX app").add_argument
    add("--model-path", metavar="DIR", type=os.path.expanduser,
        help="where the weights are; without it the built-in engine serves")  # fmt: skip
    add("--server-name", type=checked(_address), default=defaults.server_name,
        help="address to listen on: 127.0.0.1 is this machine only, 0.0.0.0 every address of IPv4, :: of IPv4 and IPv6 "
        "(default: %(default)s)")  # fmt: skip
    add("--server-port", type=checked(_port), default=defaults.server_port, help="default: %(default)s")
    add("--tmp-dir", type=os.path.expanduser, default=defaults.tmp_dir,
        help="recordings live here while the app runs (default: %(default)s)")  # fmt: skip
    add("--share", action="store_true", help="make a public gradio.live link")
    add("--model-source", choices=["auto", "local", "modelscope", "huggingface"], default=defaults.model_source)
    add("--tokenizer-model-id", metavar="ID", type=os.path.expanduser, default=defaults.tokenizer_model_id)
    add("--tts-model-id", metavar="ID", type=os.path.expanduser, help="if it differs from the model path")
    add("--quantization", choices=["int4", "int8", "awq-4bit"])
    add("--torch-dtype", choices=["float16", "bfloat16", "float32"], default=defaults.torch_dtype)
    add("--device-map", default=defaults.device_map, help="default: %(default)s")
    add("--enable-auto-transcribe", action="store_true",
        help="what is said in an uploaded recording is written into the prompt text, if that is empty")  # fmt: skip

    add = parser.add_argument_group("the page").add_argument
    add("--auth", metavar="USER:PASSWORD", type=checked(_auth), default=environ.get("GRADIO_AUTH") or None,
        help="ask for these before showing the page; who has signed in may press its buttons (environment: "
        "GRADIO_AUTH)")  # fmt: skip
    add("--allowed-host", metavar="NAME", action="append", type=checked(_names),
        help="a name under which a proxy on this machine passes on what comes from elsewhere (speech.example.org); may "
        "be given several times, or separated by commas (environment: GPU_TTS_ALLOWED_HOSTS)")  # fmt: skip
    add("--root-path", metavar="PATH", type=checked(_root_path),
        default=environ.get("GPU_TTS_ROOT_PATH") or environ.get("GRADIO_ROOT_PATH") or defaults.root_path,
        help="the path under which a reverse proxy serves the page (/tts), whether or not the proxy removes it; or the "
        "whole address (https://example.com/tts) if the proxy does not pass it on (environment: GPU_TTS_ROOT_PATH, "
        "GRADIO_ROOT_PATH)")  # fmt: skip
    add("--ssl-certfile", metavar="FILE", type=os.path.expanduser,
        help="serve https with this certificate (PEM); browsers give pages from elsewhere the microphone only over "
        "https")  # fmt: skip
    add("--ssl-keyfile", metavar="FILE", type=os.path.expanduser,
        help="the private key of the certificate (PEM, without a password)")  # fmt: skip
    add("--max-upload", metavar="SIZE", type=checked(size_bytes), default=defaults.max_upload,
        help="largest recording that may be uploaded (default: 100MB)")  # fmt: skip
    add("--max-disk", metavar="SIZE", type=checked(size_bytes), default=defaults.max_disk,
        help="disk space that recordings and results in --tmp-dir may take together "
        "(default: 5GB)")  # fmt: skip
    add("--max-audio", metavar="S", type=checked(seconds), default=defaults.max_audio,
        help="longest recording that is worked on (600, 90s, 15m; -1: any; default: 600)")  # fmt: skip
    add("--max-text", metavar="N", type=checked(_count), default=defaults.max_text,
        help="most characters of a text (default: %(default)s)")  # fmt: skip


def _add_management_flags(parser: argparse.ArgumentParser, defaults: Settings, environ: Mapping[str, str]) -> None:
    add = parser.add_argument_group("the end").add_argument
    add("--shutdown-grace", metavar="S", type=checked(seconds), default=defaults.shutdown_grace,
        help="after Ctrl-C or SIGTERM a running request may finish for this long (10, 90s, 15m; 0: not at all; "
        "-1: as long as it takes); a second signal quits at once (default: 10)")  # fmt: skip

    add = parser.add_argument_group("GPU management").add_argument
    add("--enable-gpu-management", action="store_true", help="keep the model off the GPU while it is idle")
    add("--gpu-idle-timeout", metavar="S", type=checked(seconds), default=defaults.gpu_idle_timeout,
        help="idle this long (600, 90s, 15m, 1h): released from host memory too; -1 never (default: 600)")  # fmt: skip
    add("--gpu-keep-warm", metavar="S", type=checked(keep_warm_seconds), default=defaults.gpu_keep_warm,
        help="stay on the GPU this long after a request; auto learns it from the arrivals (default: 0)")  # fmt: skip
    add("--gpu-budget", metavar="SIZE", type=checked(size_bytes),
        help="GPU memory that the models take together at most (24GB; default: what the GPU has)")  # fmt: skip
    add("--gpu-load-timeout", metavar="S", type=checked(seconds), default=defaults.gpu_load_timeout,
        help="give up a load that takes longer, and load anew on the next request (default: -1, never)")  # fmt: skip
    add("--gpu-wait-timeout", metavar="S", type=checked(seconds), default=defaults.gpu_wait_timeout,
        help="refuse a request that has waited longer for its turn, or for memory that others hold (10m, 90s; -1: "
        "never; default: 10m); a load is not counted")  # fmt: skip
    add("--gpu-isolation", choices=["none", "process"], default="none", help=argparse.SUPPRESS)
    add("--gpu-snapshot-dir", metavar="DIR", type=checked(_folder),
        help="keep released weights on disk here and read them back from it")  # fmt: skip
    add("--gpu-snapshot-limit", metavar="SIZE", type=checked(size_bytes),
        help="remove the snapshots unused for longest beyond this size (100GB; default: no limit)")  # fmt: skip
    add("--gpu-host-memory-limit", metavar="SIZE", type=checked(size_bytes),
        help="pin at most this much main memory for fast copies (16GB; default: no limit)")  # fmt: skip
    add("--simulate-gpu", metavar="SIZE", type=checked(size_bytes),
        help="a simulated card of this size (48GB), to try everything without a GPU")  # fmt: skip
    add("--control-token", metavar="TOKEN", type=checked(sendable), default=environ.get("GPU_CONTROL_TOKEN") or None,
        help="asked of changing calls under /gpu from other machines, and of looking too if there is --auth "
        "(environment: GPU_CONTROL_TOKEN)")  # fmt: skip

    add = parser.add_argument_group("engine").add_argument
    add("--engine", choices=["auto", "builtin", "step-audio"], default="auto",
        help="auto: step-audio if --model-path is given, else builtin (default: auto)")  # fmt: skip
    add("--asr-model", metavar="MODEL", type=os.path.expanduser,
        help="speech recognition for --enable-auto-transcribe: a folder or a hub's id (default: the checkout's own, or "
        "openai/whisper-large-v3)")  # fmt: skip
    add("--step-audio-root", metavar="DIR", type=os.path.expanduser, default=environ.get("STEP_AUDIO_ROOT") or None,
        help="checkout of Step-Audio-EditX (environment: STEP_AUDIO_ROOT)")  # fmt: skip


def size_bytes(text: str) -> int:
    """Parses ``48GB``, ``48GiB`` or ``512MB``; a GB is 2**30 bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])I?B?", text.strip().upper())
    nbytes = float(match[1]) * UNITS_BYTES[match[2] + "B"] if match else 0
    if not 1 <= nbytes <= _LARGEST_BYTES:
        raise InvalidInput(f"{text!r} is no size: write 48GB or 512MB", f"{text!r} 不是有效的大小：请写 48GB 或 512MB")
    return int(nbytes)


def sendable(token: str) -> str:
    """Strips a token; raises `InvalidInput`, without the token, if it is not valid in an HTTP header."""
    if not (token.strip().isascii() and token.strip().isprintable()):
        raise InvalidInput(
            "a token has only Latin letters, digits and signs, since others cannot be sent (--control-token, --token, "
            "GPU_CONTROL_TOKEN)",
            "令牌只能包含英文字母、数字和符号，其他字符无法发送（--control-token、--token、GPU_CONTROL_TOKEN）",
        )
    return token.strip()


def _auth(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise InvalidInput("write USER:PASSWORD, both not empty", "请写 用户名:密码，两者都不能为空")
    return user, password


def _names(text: str) -> tuple[str, ...]:
    """Converts host names to the form sent by browsers: lower case, non-Latin scripts as ``xn--...``."""
    names = []
    for given in filter(None, map(str.strip, text.split(","))):
        try:
            name = (urlsplit(given if "//" in given else f"//{given}").hostname or "").encode("idna").decode()
        except ValueError:  # also of encoding
            name = ""
        if not re.fullmatch(r"[\w.-]+", name):
            raise InvalidInput(
                f"{given!r} is no name of a host: write one as in the browser's address line, speech.example.org",
                f"{given!r} 不是有效的主机名：请写浏览器地址栏中的名称，如 speech.example.org",
            )
        names.append(name.removesuffix("."))
    return tuple(names)


def _address(text: str) -> str:
    """Removes brackets of an IPv6 address; converts an IPv4-mapped address to IPv4."""
    address = without_mapping(text[1:-1] if text.startswith("[") and text.endswith("]") else text)
    # IPv6 addresses may have a scope (fe80::1%eth0). Excludes 0, 127.1 and 0x7f000001, which are addresses, too.
    if not is_address(address) and not re.fullmatch(r"(?=.*[A-Za-z])(?!0x)[A-Za-z0-9_.-]+", address):
        raise InvalidInput(
            f"{text!r} is no address of this machine: give 0.0.0.0 for all, :: for all with IPv6, 127.0.0.1 for this "
            "machine only, or one of its addresses or names",
            f"{text!r} 不是本机的地址：请写 0.0.0.0（所有地址）、::（包括 IPv6）、127.0.0.1（仅本机），"
            "或本机的某个地址或名称",
        )
    return address


def _root_path(text: str) -> str:
    """Removes a final slash of a path or a whole address; empty: the root of the site."""
    given = text.strip().rstrip("/")
    parts = re.fullmatch(_ADDRESS, given)
    segments = parts["path"].split("/")[1:] if parts else ["."]
    if {".", ".."} & set(segments) or (parts and parts["port"] and not 1 <= int(parts["port"]) <= 65535):
        raise InvalidInput(
            f"{text!r} is no path of a site: write /tts, or https://example.com/tts (--root-path, GPU_TTS_ROOT_PATH, "
            f"GRADIO_ROOT_PATH)",
            f"{text!r} 不是有效的站点路径：请写 /tts 或 https://example.com/tts（--root-path、GPU_TTS_ROOT_PATH、"
            f"GRADIO_ROOT_PATH）",
        )
    if len(segments) == 1 and segments[0] in _OWN_PATHS:
        raise InvalidInput(
            f"/{segments[0]} is a path of the app itself: choose another, such as /tts",
            f"/{segments[0]} 是应用自身使用的路径：请换一个，例如 /tts",
        )
    return given


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise InvalidInput(f"{text!r} is no number: give 1 or more", f"{text!r} 不是有效的数量：请写 1 或更大的数")
    return int(text)


def _folder(text: str) -> str:
    if not text:
        raise InvalidInput("no folder is named: give one, or leave the flag out", "未指定目录：请指定，或去掉该参数")
    return os.path.expanduser(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise InvalidInput(f"{text!r} is no port: give 1 to 65535", f"{text!r} 不是有效的端口：请写 1 到 65535")
    return int(text)


def checked(read: Callable[[str], T]) -> Callable[[str], T]:
    """Returns an argparse type that shows the message of `InvalidInput`; argparse hides those of other exceptions."""

    def convert(text: str) -> T:
        try:
            return read(text)
        except InvalidInput as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
