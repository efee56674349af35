"""Checks before a start, and before a running app is stopped for a new one: folders, models, disk, port."""

from __future__ import annotations

import errno
import io
import os
import re
import tempfile
from contextlib import redirect_stderr
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from ..errors import InvalidInput
from ..scheduling.policies import keep_warm_seconds, seconds
from ..sentences import in_locale
from .options import HERE, LaunchSettings, absolute, named
from .port import reason, refusal
from .terminal import fail, output_of, say

DISK_CUDA_MB = 9000
"""Disk space of the first install, with the CUDA libraries of torch."""
DISK_CPU_MB = 3000


def check_settings(settings: LaunchSettings) -> None:
    """Raises `LaunchError` for an unusable setting."""
    for name, read in (("GPU_IDLE_TIMEOUT", seconds), ("GPU_KEEP_WARM", keep_warm_seconds)):
        text = getattr(settings, name.lower())
        try:
            read(text)
        except InvalidInput as error:
            fail(f"{settings.named(name)} {error.en.removeprefix(repr(text)).strip()}",
                 f"{settings.named(name)} {error.zh.removeprefix(repr(text)).strip()}")  # fmt: skip
    project, checkout = Path(settings.project_dir), settings.step_audio_root
    if not (project / "app.py").is_file() or not (project / "requirements.txt").is_file():
        what = settings.named("PROJECT_DIR")
        fail(f"{what} has no app.py and requirements.txt: give this project's folder",
             f"{what} 中没有 app.py 和 requirements.txt：请指向本项目目录")  # fmt: skip
    what = settings.named("STEP_AUDIO_ROOT")
    if checkout and not os.path.isdir(checkout):
        fail(f"{what} is no folder: give a checkout of Step-Audio-EditX",
             f"{what} 不是目录：请指向 Step-Audio-EditX 的代码目录")  # fmt: skip
    if checkout and not os.path.isfile(f"{checkout}/tts.py"):
        say(f"⚠️  {what} has no tts.py: it is no checkout of Step-Audio-EditX",
            f"⚠️  {what} 中没有 tts.py，不是 Step-Audio-EditX 的代码目录")  # fmt: skip
    _check_models(settings)
    if settings.gpu_snapshot_dir:
        check_writable(settings.gpu_snapshot_dir, settings.named("GPU_SNAPSHOT_DIR"))
    if tmp_dir := value_of("--tmp-dir", settings):
        check_writable(absolute(tmp_dir), named("TMP_DIR", absolute(tmp_dir), ""))
    _check_arguments(settings)


def value_of(flag: str, settings: LaunchSettings) -> str:
    """Returns the value of an argument of app.py; empty if it is not given."""
    found = ""
    for word, following in pairwise((*settings.arguments, "")):
        if word == flag:
            found = following
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def _check_models(settings: LaunchSettings) -> None:
    """Checks the folder with the weights, unless app.py takes the path as a hub id (same rule as there)."""
    path, source = settings.model_path, value_of("--model-source", settings) or "auto"
    what = settings.named("MODEL_PATH")
    if not path or source in ("huggingface", "modelscope"):
        return
    if source == "auto" and not os.path.exists(path) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", path):
        say(f"{what} is no folder here, so it is taken as the id of a hub", f"此处没有目录 {what}，按模型仓库 ID 处理")
        return
    if not os.path.isdir(path) or not os.access(path, os.R_OK | os.X_OK):
        fail(
            f"{what} is no folder that can be read: give the one with the weights, or leave it out for the built-in "
            f"engine",
            f"{what} 不是可读的目录：请指向权重目录，或不设置以使用内置引擎",
        )
    parts = ("Step-Audio-Tokenizer", "Step-Audio-EditX")
    if missing := " ".join(part for part in parts if not any(Path(path).glob(f"{part}*"))):
        say(f"⚠️  {what} has no {missing}: requests will say how to get it",
            f"⚠️  {what} 中没有 {missing}：收到请求时会提示如何获取")  # fmt: skip


def app_arguments(settings: LaunchSettings) -> list[str]:
    words = ["--enable-gpu-management", *settings.arguments]
    words += ["--server-name", settings.host, "--server-port", str(settings.port)]
    for name in ("gpu_idle_timeout", "gpu_keep_warm", "gpu_snapshot_dir", "model_path", "step_audio_root"):
        if value := getattr(settings, name):
            words += ["--" + name.replace("_", "-"), value]
    return words


def _check_arguments(settings: LaunchSettings) -> None:
    """Parses the arguments as app.py does, before an install or the stop of a running app. Raises `LaunchError`."""
    if settings.project_dir != HERE:
        return  # another version, maybe with other arguments
    from .settings import parse

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            parse(app_arguments(settings))
    except SystemExit:
        error = said.getvalue().partition(": error: ")[2].strip()
        flag = "".join(re.findall(r"^argument \S+: ", error))
        words = flag + in_locale(error.removeprefix(flag))
        fail(f"{words} (app.py --help tells them all)", f"参数有误：{words}（全部参数见 app.py --help）")


def _existing(path: str) -> Path:
    """Returns the folder, or its nearest existing parent."""
    folder = Path(os.path.realpath(path))
    if os.path.islink(path) and not folder.parent.exists():
        return Path(path)  # no folder is made behind a link to an unmounted disk
    while not folder.exists() and not folder.is_symlink():
        folder = folder.parent
    return folder


def check_writable(path: str, what: str) -> None:
    folder = _existing(path)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        fail(f"{what} cannot be written: give a folder that can be", f"{what} 不可写：请指向可写的目录")


def check_run_dir(settings: LaunchSettings) -> None:
    """Tests that the log and the record can be written. With --check, writes no file."""
    what = settings.named("RUN_DIR")
    check_writable(settings.run_dir, what)
    if settings.check:
        return
    try:
        os.makedirs(settings.run_dir, exist_ok=True)
        # A unique name, since another start may run the same check.
        with tempfile.NamedTemporaryFile(dir=settings.run_dir, prefix=f"{settings.port}.", suffix=".try") as file:
            file.write(b"\n")
            file.flush()
    except OSError as error:
        fail(f"{what} cannot be written ({error.strerror}): free space, or give another folder",
             f"{what} 无法写入（{error.strerror}）：请清理空间，或换一个目录")  # fmt: skip


def check_disk(path: str, en: str, zh: str) -> None:
    """Raises `LaunchError` without disk space for an install in a folder; ``en`` and ``zh`` name what is installed."""
    needed = DISK_CPU_MB if "/cpu" in os.environ.get("TORCH_INDEX_URL", "") else DISK_CUDA_MB
    free = (output_of("df", "-Pm", str(_existing(path))) or "").splitlines()[-1:]
    if free and int(free[0].split()[3]) < needed:
        free_mb = free[0].split()[3]
        fail(f"{en} needs about {needed} MB in {path}, and there are {free_mb} MB. Free space, or choose another disk",
             f"{zh} 需要在 {path} 中占用约 {needed} MB，现有 {free_mb} MB。请清理空间或换一个磁盘")  # fmt: skip


def check_port(settings: LaunchSettings, port: int) -> None:
    """Binds as the server will. Raises `LaunchError` with the holder of the port and a free port. Port 0: host only."""
    error = refusal(settings.host, port)
    if error is None:
        return
    if getattr(error, "errno", None) != errno.EADDRINUSE:
        cannot_listen(settings, reason(error))
    port_in_use(settings)


def cannot_listen(settings: LaunchSettings, why: str) -> NoReturn:
    host, port = settings.named("HOST"), settings.port
    fail(
        f"Cannot listen on {host}, PORT {port}: {why}. Give an address of this machine (--host 127.0.0.1) and a port "
        f"above 1023",
        f"无法监听 {host} PORT {port}：{why}。请使用本机地址（--host 127.0.0.1）和大于 1023 的端口",
    )


def port_in_use(settings: LaunchSettings) -> NoReturn:
    port = settings.port
    other = next(each for each in (*range(port + 1, 65536), *range(1024, port)) if not refusal(settings.host, each))
    en = zh = ""
    for pid in holders_of_port(port)[:1]:
        command = (output_of("ps", "-o", "args=", "-p", str(pid)) or "")[:80]
        en, zh = f" by pid {pid}: {command}", f"（进程 {pid}：{command}）"
    fail(f"Port {port} on {settings.host} is in use{en}. Stop that program or choose another port: --port {other}",
         f"{settings.host} 的端口 {port} 已被占用{zh}。请停止占用它的程序，或换一个端口：--port {other}")  # fmt: skip


def holders_of_port(port: int) -> list[int]:
    """Returns the pids of processes that listen on the port, as far as visible to this user."""
    pids = re.findall(r"pid=(\d+)", output_of("ss", "-Hltnp", f"sport = :{port}") or "")
    pids = pids or (output_of("lsof", "-nP", "-t", f"-iTCP:{port}", "-sTCP:LISTEN") or "").split()
    return sorted({int(pid) for pid in pids})
