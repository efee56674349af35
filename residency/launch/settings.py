"""Settings of app.py, from the command line and the environment; validated before models load.

Flags of the Step-Audio-EditX app keep their names, choices and defaults. Imports little, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import InvalidInput
from ..scheduling.policies import keep_warm_seconds, seconds
from .listening import check_certificate
from .model_path import check_model_path
from .values import (
    SimulatedCard,
    api_keys,
    checked,
    count,
    folder_path,
    host_names,
    listening_address,
    login,
    memory_share,
    neighbors,
    port_number,
    sendable,
    simulated_card,
    site_origins,
    site_path,
    size_bytes,
)

_METAVARS: dict[object, str] = {seconds: "S", keep_warm_seconds: "S", size_bytes: "SIZE", simulated_card: "SIZE"}


def _flag(default: Any, help: str | None = None, read: Callable[[str], object] | None = None, **argument: Any) -> Any:
    """Returns a field that is a flag of `Settings`; ``argument`` goes to argparse.

    ``read`` converts the text and may raise `InvalidInput`. ``variables`` are read in order if the flag is not given; a
    flag with ``group`` begins a group of flags. ``engine``: see `Settings.engine_flags`. A flag that is on by default
    has the help of its opposite, ``--no-...``, and ``on``, the help of the flag itself.
    """
    if read in _METAVARS:
        argument["metavar"] = _METAVARS[read]
    secret = argument.pop("secret", False)
    return field(default=default, repr=not secret, metadata={"help": help, "read": read, **argument})


@dataclass(frozen=True)
class Settings:
    """Flags of ``app.py``; times in seconds (`math.inf`: never), sizes in bytes."""

    # fmt: off
    model_path: str | None = _flag(
        None, "folder with the weights; without it, the built-in engine is used", os.path.expanduser, metavar="DIR",
        group="as in the Step-Audio-EditX app")
    server_name: str = _flag(
        "0.0.0.0", "address to listen on: 127.0.0.1 is this machine only, 0.0.0.0 every address of IPv4, :: of IPv4 "
        "and IPv6 (default: %(default)s)", listening_address)
    server_port: int = _flag(7860, "default: %(default)s", port_number)
    tmp_dir: str = _flag(
        "/tmp/gradio", "folder for recordings while the app runs (default: %(default)s)", os.path.expanduser)
    share: bool = _flag(False, "make a public gradio.live link")
    model_source: str = _flag("auto", choices=["auto", "local", "modelscope", "huggingface"])
    tts_model_id: str | None = _flag(None, "if it differs from the model path", os.path.expanduser, metavar="ID")
    quantization: str | None = _flag(
        None, "int4, int8 and awq-4bit: checkouts of 2025; awq, gptq and fp8: checkouts of 2026",
        choices=["int4", "int8", "awq-4bit", "awq", "gptq", "fp8"], engine=True)
    enable_auto_transcribe: bool = _flag(
        False, "write the words of an uploaded recording into the prompt text, if that is empty")

    tokenizer_model_id: str = _flag(
        "dengcunqin/speech_paraformer-large_asr_nat-zh-cantonese-en-16k-vocab8501-online", None, os.path.expanduser,
        metavar="ID", engine=True, group="only for checkouts of 2025 (transformers), as in their app")
    torch_dtype: str = _flag("bfloat16", choices=["float16", "bfloat16", "float32"], engine=True)
    device_map: str = _flag("cuda", "default: %(default)s", engine=True)

    tokenizer_path: str | None = _flag(
        None, "the folder Step-Audio-Tokenizer (default: beside the folder in --model-path, else in it)",
        os.path.expanduser, metavar="DIR", engine=True, group="only for checkouts of 2026 (vLLM), as in their app")
    tensor_parallel_size: int = _flag(
        1, "number of GPUs for the language model (default: %(default)s)", count, metavar="N", engine=True)
    gpu_memory_utilization: float = _flag(
        0.5, "share of the GPU's memory for the language model and its KV cache, above 0, at most 1 (default: "
        "%(default)s)", memory_share, metavar="SHARE", engine=True)
    max_model_len: int = _flag(
        3072, "context of the language model in tokens; it limits the length of recordings (default: %(default)s)",
        count, metavar="N", engine=True)
    dtype: str = _flag("bfloat16", choices=["float16", "bfloat16"], engine=True)
    enforce_eager: bool = _flag(False, "no CUDA graphs in the language model: less memory, slower", engine=True)
    kv_cache_dtype: str | None = _flag(
        None, "data type of the KV cache (default: that of the model)", choices=["auto", "fp8", "fp8_e5m2", "fp8_e4m3"],
        engine=True)
    max_num_seqs: int | None = _flag(
        None, "largest number of sequences at once (default: that of vLLM)", count, metavar="N", engine=True)
    max_num_batched_tokens: int | None = _flag(
        None, "largest number of tokens in a step (default: that of vLLM)", count, metavar="N", engine=True)
    cosyvoice_dtype: str = _flag("float32", choices=["float32", "bfloat16", "float16"], engine=True)
    cosyvoice_cuda_graph: bool = _flag(
        True, "no CUDA graphs in the vocoder (the default with --enable-gpu-management)", engine=True,
        on="CUDA graphs in the vocoder with --enable-gpu-management, too: the model is only released, never offloaded")

    auth: tuple[str, str] | None = _flag(
        None, "login that the page requires; users who have logged in may use its buttons (environment: GRADIO_AUTH)",
        login, metavar="USER:PASSWORD", variables=("GRADIO_AUTH",), secret=True, group="the page")
    allowed_hosts: tuple[str, ...] = _flag(
        (), "host name under which a proxy on this machine forwards requests from elsewhere (speech.example.org); may "
        "be given several times, or separated by commas (environment: GPU_TTS_ALLOWED_HOSTS)",
        host_names, metavar="NAME", action="append", flag="--allowed-host", unset=None)
    root_path: str = _flag(
        "", "path under which a reverse proxy serves the page (/tts), whether or not the proxy removes it; or the "
        "whole address (https://example.com/tts) if the proxy does not forward it (environment: GPU_TTS_ROOT_PATH, "
        "GRADIO_ROOT_PATH)", site_path, metavar="PATH", variables=("GPU_TTS_ROOT_PATH", "GRADIO_ROOT_PATH"))
    ssl_certfile: str | None = _flag(
        None, "serve https with this certificate (PEM); browsers allow pages from other machines to use the microphone "
        "only over https", os.path.expanduser, metavar="FILE")
    ssl_keyfile: str | None = _flag(
        None, "private key of the certificate (PEM, without a password)", os.path.expanduser, metavar="FILE")
    max_upload: int = _flag(100 << 20, "largest recording that may be uploaded (default: 100MB)", size_bytes)
    max_disk: int = _flag(
        5 << 30, "disk space for all recordings and results in --tmp-dir (default: 5GB)", size_bytes)
    max_audio: float = _flag(600.0, "longest recording (600, 90s, 15m; -1: no limit; default: 600)", seconds)
    max_text: int | None = _flag(
        None, "largest number of characters in a text (default: 5000; a target text of Step-Audio-EditX: 1000, as in "
        "its app)", count, metavar="N")

    voices_dir: str = _flag(
        "", "folder of the stored voices, which outlive the app, or the URL of an object store, such as "
        "s3://BUCKET/voices (default: gpu-managed-tts/voices in $XDG_DATA_HOME, or in ~/.local/share; environment: "
        "GPU_TTS_VOICES_DIR)", folder_path, metavar="DIR",
        variables=("GPU_TTS_VOICES_DIR",), unset=None, group="voices and the speech API under /v1")
    api_keys: tuple[str, ...] = _flag(
        (), "key of at least 16 characters that all calls under /v1 need; may be given several times, or separated by "
        "commas (environment: GPU_TTS_API_KEYS)",
        api_keys, metavar="KEY", action="append", flag="--api-key", unset=None, secret=True)
    cors_origins: tuple[str, ...] = _flag(
        (), "site whose pages may call /v1 from browsers (https://example.org); may be given several times, or "
        "separated by commas (environment: GPU_TTS_CORS_ORIGINS)",
        site_origins, metavar="ORIGIN", action="append", flag="--cors-origin", unset=None)
    max_requests: int = _flag(
        100, "largest number of requests under /v1 that wait or run at the same time (default: %(default)s)",
        count, metavar="N")

    shutdown_grace: float = _flag(
        10.0, "time for running requests to finish after Ctrl-C or SIGTERM (10, 90s, 15m; 0: none; -1: no limit); a "
        "second signal ends the app at once (default: 10)", seconds, group="shutdown")

    enable_gpu_management: bool = _flag(False, "keep the model off the GPU while it is idle", group="GPU management")
    gpu_idle_timeout: float = _flag(
        600.0, "idle time (600, 90s, 15m, 1h) after which the model is released from host memory, too; -1: never "
        "(default: 600)", seconds)
    gpu_keep_warm: float | Literal["auto"] = _flag(
        0.0, "keep the model on the GPU this long after a request; auto learns the time from the arrivals of requests "
        "(default: 0)", keep_warm_seconds)
    gpu_budget: int | None = _flag(
        None, "limit of the GPU memory of all models together (24GB; default: the memory of the GPU)", size_bytes)
    gpu_load_timeout: float = _flag(
        math.inf, "cancel a load that takes longer; the next request loads again (default: -1, never)", seconds)
    gpu_wait_timeout: float = _flag(
        600.0, "refuse a request that has waited longer for its turn, or for memory in use by others (10m, 90s; -1: "
        "never; default: 10m); loading is not counted", seconds)
    gpu_snapshot_dir: str | None = _flag(
        None, "folder for snapshots of released weights, from which they are loaded again", folder_path, metavar="DIR")
    gpu_snapshot_limit: int | None = _flag(
        None, "size of all snapshots beyond which the least recently used are deleted (100GB; default: no limit)",
        size_bytes)
    gpu_host_memory_limit: int | None = _flag(
        None, "limit of pinned main memory for fast copies, and of weights that ended worker processes have left "
        "(16GB; default: no limit)", size_bytes)
    gpu_isolation: Literal["none", "process"] = _flag(
        "none", "process: each model in a worker process of its own, which a release ends, so that nothing of it is "
        "left on the GPU; Linux only (default: %(default)s)", choices=["none", "process"])
    gpu_residue: Literal["keep", "checkpoint", "auto"] = _flag(
        "auto", "with --gpu-isolation process: what an offload leaves of the worker on the GPU (CUDA context, "
        "workspaces) stays there (keep) or is moved to main memory by the driver (checkpoint); auto: where the driver "
        "can do that (default: %(default)s)", choices=["keep", "checkpoint", "auto"])
    gpu_headroom: int = _flag(
        0, "idle models leave the GPU when less than this is free (2GB), as other processes need it", size_bytes)
    gpu_neighbor: tuple[str, ...] = _flag(
        (), "server that is asked to give up what it holds idle when a request needs room on the GPU: KIND=URL "
        "(ollama=http://127.0.0.1:11434), or auto for those found by their processes; may be given several times",
        neighbors, metavar="KIND=URL", action="append", unset=None, secret=True)
    gpu_share_dir: str | None = _flag(
        None, "folder in which apps of this project, also in other containers, queue for room on the same GPU",
        folder_path, metavar="DIR")
    simulate_gpu: SimulatedCard | None = _flag(  # noqa: RUF009 - as those above
        None, "simulated GPU of this size (48GB), to try everything without a GPU; with context=400MB each process "
        "that uses it takes 400 MB for its CUDA context, with shared=NAME several programs use the same one "
        "(48GB,context=400MB,shared=NAME)", simulated_card)
    control_token: str | None = _flag(
        None, "token that other machines need for changing calls under /gpu, and with --auth also for reading calls "
        "(environment: GPU_CONTROL_TOKEN)",
        sendable, metavar="TOKEN", variables=("GPU_CONTROL_TOKEN",), secret=True)

    engine: Literal["builtin", "step-audio", "ray"] = _flag(
        "builtin", "auto: step-audio if --model-path is given, else builtin; ray: replicas on Ray Serve (default: "
        "auto)",
        choices=["auto", "builtin", "step-audio", "ray"], unset="auto", group="engine")
    ray_address: str = _flag(
        "auto", "the cluster of --engine ray: HOST:PORT, or auto, the one that runs on this machine "
        "(default: auto)", metavar="ADDRESS")
    asr_model: str | None = _flag(
        None, "speech recognition for --enable-auto-transcribe: a folder, or the id of a model on a hub (default: the "
        "checkout's own, or openai/whisper-large-v3)", os.path.expanduser, metavar="MODEL")
    step_audio_root: str | None = _flag(
        None, "checkout of Step-Audio-EditX (environment: STEP_AUDIO_ROOT)",
        os.path.expanduser, metavar="DIR", variables=("STEP_AUDIO_ROOT",))
    # fmt: on

    given: frozenset[str] = frozenset()
    """Names of the given flags of the engine."""

    def engine_flags(self) -> dict[str, object]:
        """Returns the given flags of the engine (``quantization``, and those of one generation only) by their names."""
        return {name: getattr(self, name) for name in ENGINE_FLAGS if name in self.given}


ENGINE_FLAGS = tuple(each.name for each in fields(Settings) if each.metadata.get("engine"))


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ, *, files_here: bool = True) -> Settings:
    """Parses flags, which override the environment. Exits with code 2 and a message if a value is invalid.

    ``files_here``: False if the model's files are on another machine, and cannot be checked.
    """
    parser = _parser(environ)
    # argparse sets no default where the namespace has a value already: None remains for flags that are not given.
    namespace = argparse.Namespace(**dict.fromkeys(ENGINE_FLAGS))
    values = vars(parser.parse_args(argv, namespace))
    left_out = {name for name in ENGINE_FLAGS if values[name] is None}
    values = {name: value for name, value in values.items() if name not in left_out}
    values["given"] = frozenset(ENGINE_FLAGS) - left_out
    try:
        return _checked_settings(values, environ, files_here)
    except InvalidInput as error:
        parser.error(str(error))


def _checked_settings(values: dict[str, Any], environ: Mapping[str, str], files_here: bool) -> Settings:
    """Checks flags against each other; raises `InvalidInput`."""
    for flag, needed in (
        ("simulate_gpu", "enable_gpu_management"),
        ("gpu_isolation", "enable_gpu_management"),
        ("asr_model", "enable_auto_transcribe"),
    ):
        if values[flag] not in (None, "none") and not values[needed]:
            en, zh = "{0} needs {1}; add it or leave {0} out", "{0} 需要与 {1} 一起使用"
            flags = ["--" + name.replace("_", "-") for name in (flag, needed)]
            raise InvalidInput(en.format(*flags), zh.format(*flags))
    model = values["asr_model"] or ""
    if model.startswith(("/", ".", "~")) and not Path(model).is_dir():
        raise InvalidInput(
            f"--asr-model {model} is not a folder: give one with a model, or the id of a model on a hub "
            f"(openai/whisper-small)",
            f"--asr-model {model} 不是目录：请指定模型目录或模型仓库 ID（openai/whisper-small）",
        )
    for name, variable, read in (
        ("allowed_hosts", "GPU_TTS_ALLOWED_HOSTS", host_names),
        ("api_keys", "GPU_TTS_API_KEYS", api_keys),
        ("cors_origins", "GPU_TTS_CORS_ORIGINS", site_origins),
        ("gpu_neighbor", "GPU_TTS_GPU_NEIGHBOR", neighbors),
    ):
        try:
            value = environ.get(variable)
            given = values[name] or ([read(value)] if value else [])
        except InvalidInput as error:
            raise InvalidInput(f"{variable}: {error.en}", f"{variable}：{error.zh}") from None
        values[name] = tuple(value for several in given for value in several)
    values["voices_dir"] = values["voices_dir"] or default_voices_dir(environ)
    if values["engine"] == "auto":
        values["engine"] = "step-audio" if values["model_path"] else "builtin"
    if values["engine"] == "ray" and (values["enable_gpu_management"] or values["model_path"]):
        raise InvalidInput(
            "--engine ray leaves models and their GPUs to the replicas: leave --enable-gpu-management and --model-path "
            "out, and give them to the replicas (deploy/ray_serve.yaml)",
            "--engine ray 的模型与 GPU 由副本管理：请去掉 --enable-gpu-management 和 --model-path，"
            "并写在副本的配置中（deploy/ray_serve.yaml）",
        )
    check_certificate(values["ssl_certfile"], values["ssl_keyfile"])
    if values["engine"] == "step-audio" and files_here:
        check_model_path(values["model_path"], values["model_source"])
    return Settings(**values)


def default_voices_dir(environ: Mapping[str, str]) -> str:
    """Returns the folder of the stored voices, by the XDG Base Directory Specification."""
    data = environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.path.join(data, "gpu-managed-tts", "voices")


def _parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Step-Audio-EditX in the browser; its model leaves the GPU while it is idle.", allow_abbrev=False
    )
    group: argparse._ActionsContainer = parser
    for each in fields(Settings):
        argument = dict(each.metadata)
        if not argument:
            continue
        argument.pop("engine", None)
        if title := argument.pop("group", None):
            group = parser.add_argument_group(title)
        variables, flag = argument.pop("variables", ()), argument.pop("flag", "--" + each.name.replace("_", "-"))
        default = next(filter(None, map(environ.get, variables)), argument.pop("unset", each.default))
        if each.default is False:
            group.add_argument(flag, dest=each.name, action="store_true", help=argument["help"])
            continue
        if each.default is True:
            off = "--no-" + flag.removeprefix("--")
            group.add_argument(off, dest=each.name, action="store_false", default=None, help=argument["help"])
            group.add_argument(flag, dest=each.name, action="store_true", default=None, help=argument["on"])
            continue
        if read := argument.pop("read"):
            argument["type"] = checked(read)
        group.add_argument(flag, dest=each.name, default=default, **argument)
    return parser
