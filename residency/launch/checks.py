"""Checks before a start, and before a running app is stopped for a new one: folders, models, arguments, disk."""

from __future__ import annotations

import io
import os
import re
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

from ..sentences import in_locale
from .model_path import may_be_hub_id
from .options import OF_FLAG, THIS_PROJECT, LaunchSettings, absolute
from .settings import parse
from .terminal import fail, output_of, say

DISK_CUDA_MB = 9000
"""Disk space of the first install, with the CUDA libraries of torch."""
DISK_CPU_MB = 3000


def check_settings(settings: LaunchSettings) -> None:
    """Raises `LaunchError` for an unusable setting; warns of missing models."""
    project, checkout = Path(settings.project_dir), settings.step_audio_root
    if not (project / "app.py").is_file() or not (project / "requirements.txt").is_file():
        what = settings.named("PROJECT_DIR")
        fail(f"{what} has no app.py and requirements.txt: give this project's folder",
             f"{what} 中没有 app.py 和 requirements.txt：请指向本项目目录")  # fmt: skip
    what = settings.named("STEP_AUDIO_ROOT")
    if checkout and not os.path.isdir(checkout):
        fail(f"{what} is not a folder: give a checkout of Step-Audio-EditX",
             f"{what} 不是目录：请指向 Step-Audio-EditX 的代码目录")  # fmt: skip
    if checkout and not os.path.isfile(f"{checkout}/tts.py"):
        say(f"⚠️  {what} has no tts.py: it is not a checkout of Step-Audio-EditX",
            f"⚠️  {what} 中没有 tts.py，不是 Step-Audio-EditX 的代码目录")  # fmt: skip
    if project == Path(THIS_PROJECT):  # another version may have other arguments
        _check_arguments(settings)
    path, what = settings.model_path, settings.named("MODEL_PATH")
    parts: tuple[str, ...] = ("Step-Audio-Tokenizer", "Step-Audio-EditX")
    if os.path.isfile(f"{path}/config.json"):  # the model's own folder, which checkouts of 2026 take
        parts = ()
    if os.path.isdir(path) and (missing := [part for part in parts if not any(Path(path).glob(f"{part}*"))]):
        say(f"⚠️  {what} has no {' '.join(missing)}: the first request will explain how to get it",
            f"⚠️  {what} 中没有 {' '.join(missing)}：收到请求时会提示如何获取")  # fmt: skip
    elif path and may_be_hub_id(path, settings.app_argument("--model-source") or "auto"):
        say(
            f"{what} is not a folder here, so it is used as the id of a hub", f"此处没有目录 {what}，按模型仓库 ID 处理"
        )
    if settings.gpu_snapshot_dir:
        check_writable(settings.gpu_snapshot_dir, settings.named("GPU_SNAPSHOT_DIR"))
    if tmp_dir := settings.app_argument("--tmp-dir"):
        check_writable(absolute(tmp_dir), f"TMP_DIR '{absolute(tmp_dir)}'")


def _check_arguments(settings: LaunchSettings) -> None:
    """Parses the arguments as app.py does. Names settings of the launcher in the message by their source."""
    output = io.StringIO()
    try:
        with redirect_stderr(output):
            parse(settings.app_arguments())
    except SystemExit:
        error = output.getvalue().partition(": error: ")[2].strip()
        argument = re.match(r"argument (\S+): ", error)
        words = in_locale(error.removeprefix(argument[0] if argument else ""))
        if argument and (name := OF_FLAG.get(argument[1])):
            words = f"{settings.named(name)} {words.removeprefix(repr(getattr(settings, name.lower()))).strip()}"
        elif argument:
            words = argument[0] + words
        words = words.replace(f"--model-path {settings.model_path}", settings.named("MODEL_PATH"))
        if error.startswith("unrecognized"):
            fail(f"{words} (known ones: app.py --help)", f"参数有误：{words}（全部参数见 app.py --help）")
        fail(words, words)


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
        fail(f"{what} cannot be written: give another folder", f"{what} 不可写：请指向可写的目录")


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
    free_mb = (output_of("df", "-Pm", str(_existing(path))) or f"? ? ? {needed}").splitlines()[-1].split()[3]
    if int(free_mb) < needed:
        fail(f"{en} needs about {needed} MB in {path}, but only {free_mb} MB are free. Free space, or choose another "
             "disk",
             f"{zh} 需要在 {path} 中占用约 {needed} MB，仅剩 {free_mb} MB。请清理空间或换一个磁盘")  # fmt: skip
