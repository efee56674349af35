"""Creates, completes and repairs the project's Python environment; never changes a foreign one.

Command: ``python -m residency.launch.environment VENV REQUIREMENTS...``
"""

from __future__ import annotations

import fcntl
import filecmp
import importlib.util
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Literal

from ..errors import ResidencyError
from .terminal import choose, fail, output_of, report, say

EnvironmentState = Literal["absent", "broken", "outdated", "ready", "foreign", "taken"]

MARK = ".gpu-managed-tts"
"""Folder in an environment made here: a copy of each completely installed requirements file, and the lock."""
REPORT_EVERY_S = 10.0
"""Interval between progress lines in a log."""
REWRITE_EVERY_S = 1.0
"""The same in a terminal, which rewrites one line."""


def python_of(venv: Path) -> str:
    return str(venv / "bin" / "python")


def environment_state(venv: Path, files: Sequence[Path]) -> EnvironmentState:
    """Returns the state; ``foreign``: not made here; ``taken``: a folder that is no environment."""
    if not (venv / MARK).exists():
        if os.access(python_of(venv), os.X_OK):
            return "foreign"
        return "taken" if venv.exists() and (not venv.is_dir() or any(venv.iterdir())) else "absent"
    # Also broken after an upgrade of the system's Python.
    if output_of(python_of(venv), "-Ic", "import pip") is None:
        return "broken"
    return "ready" if all(_is_installed(venv, file) for file in files) else "outdated"


def _is_installed(venv: Path, file: Path) -> bool:
    copy = venv / MARK / file.name
    return copy.exists() and filecmp.cmp(file, copy, shallow=False)


def _base_python() -> str:
    """Returns a Python that can make an environment: this one, outside of any. Raises `LaunchError` without venv."""
    if importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"):
        return os.path.realpath(sys.executable)
    fail(f"{sys.executable} has no venv module. On Debian and Ubuntu: sudo apt-get install python3-venv",
         f"{sys.executable} 缺少 venv 模块。Debian / Ubuntu 请执行：sudo apt-get install python3-venv")  # fmt: skip


def plan_environment(venv: Path, files: Sequence[Path]) -> EnvironmentState:
    """Prints what `prepare_environment` would do; raises `LaunchError` if that is impossible."""
    state = environment_state(venv, files)
    if state == "taken":
        fail(f"{venv} exists and is not a Python environment. Give another folder with VENV_DIR",
             f"{venv} 已存在但不是 Python 环境。请用 VENV_DIR 指定其他目录")  # fmt: skip
    python = _base_python() if state in ("absent", "broken") else ""
    en, zh = {
        "ready": ("is ready", "已就绪"),
        "outdated": ("needs an install", "需要安装依赖"),
        "absent": (f"will be created with {python} and filled", f"用 {python} 创建并安装依赖"),
        "broken": (f"is incomplete; it will be created again with {python}", f"不完整，用 {python} 重建"),
        "foreign": ("was not created by this project; it is used unchanged", "不是本项目创建的，按原样使用"),
    }[state]
    say(f"Environment: {venv} {en}", f"环境：{venv} {zh}")
    if state == "foreign":
        _check_foreign(venv, files)
    return state


def _check_foreign(venv: Path, files: Sequence[Path]) -> None:
    """Reports packages missing from a foreign environment; raises `LaunchError` if the app could not start."""
    paths = output_of(python_of(venv), "-Ic", r"import sys; print(*sys.path, sep='\n')")
    if paths is None:
        fail(f"{venv}/bin/python does not run", f"{venv}/bin/python 无法运行")
    lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
    names = dict.fromkeys(match[0] for match in map(re.compile(r"[A-Za-z0-9][\w.-]*").match, lines) if match)

    def lacks(name: str) -> bool:
        return not any(metadata.distributions(name=name, path=paths.splitlines()))

    # onnxruntime-gpu contains the modules of onnxruntime.
    missing = " ".join(name for name in names if lacks(name) and lacks(f"{name}-gpu"))
    if {"torch", "gradio"} & set(missing.split()):
        fail(f"{venv} lacks {missing}. Install them there, or leave VENV_DIR out to have an environment created",
             f"{venv} 缺少 {missing}。请在其中安装，或不设置 VENV_DIR 以自动创建环境")  # fmt: skip
    if missing:
        say(
            f"⚠️  {venv} lacks {missing}; features that need them will not work",
            f"⚠️  {venv} 缺少 {missing}，相关功能不可用",
        )


def prepare_environment(venv: Path, files: Sequence[Path]) -> None:
    """Creates, repairs or completes the environment; fast if it is ready."""
    if plan_environment(venv, files) in ("ready", "foreign"):
        return
    venv = venv.resolve()  # the target of a link may not exist yet
    try:
        (venv / MARK).mkdir(parents=True, exist_ok=True)
        lock = open(venv / MARK / "lock", "w")  # noqa: SIM115
    except OSError as error:
        fail(f"{venv} cannot be created ({error.strerror}): give a folder that can be written with VENV_DIR",
             f"无法创建 {venv}（{error.strerror}）：请用 VENV_DIR 指定可写的目录")  # fmt: skip
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Another start is setting up {venv}; waiting for it", f"另一个启动进程正在准备 {venv}，等待其完成")
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Again under the lock, since another start may have completed it.
        if environment_state(venv, files) == "broken":
            _recreate(venv)
        for file in files:
            if not _is_installed(venv, file):
                (venv / MARK / file.name).unlink(missing_ok=True)
                _install(venv, file)
                shutil.copy(file, venv / MARK)


def _recreate(venv: Path) -> None:
    for path in (*(path for path in venv.iterdir() if path.name != MARK), *(venv / MARK).glob("*.txt")):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    python = _base_python()
    if subprocess.run([python, "-m", "venv", venv]).returncode:
        fail(f"{python} could not create {venv} (see above)", f"{python} 无法创建 {venv}（见上）")


def _install(venv: Path, file: Path) -> None:
    """Installs PyTorch first and alone, so that its index (TORCH_INDEX_URL) is used for no other package."""
    say(f"Installing {file}", f"正在安装 {file}")
    installs = [(str(file), ["-r", str(file)])]
    if torch := re.search(r"^torch==[^ ;\n]*", file.read_text(encoding="utf-8"), re.MULTILINE):
        index = os.environ.get("TORCH_INDEX_URL")
        installs.insert(0, (torch[0], [*(["--index-url", index] if index else []), torch[0]]))
    for what, arguments in installs:
        pip = [python_of(venv), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
        if watched(what, venv, [*pip, *arguments]):
            fail(
                f"{what} could not be installed (see pip's reason above). Check the network and the disk space, or set "
                f"a mirror with PIP_INDEX_URL (PyTorch's with TORCH_INDEX_URL); then run this again to continue",
                f"{what} 安装失败（原因见上方 pip 输出）。请检查网络与磁盘空间，或用 PIP_INDEX_URL 指定镜像"
                f"（PyTorch 用 TORCH_INDEX_URL），然后重新运行，会从中断处继续",
            )


def watched(what: str, venv: Path, command: Sequence[str]) -> int:
    """Runs an install; reports time and disk use (environment and downloads) while it is silent. Returns its status."""
    every_s, before, after = REPORT_EVERY_S, "", "\n"
    if sys.stdout.isatty():
        every_s, before, after = REWRITE_EVERY_S, "\r\x1b[K", ""
    began = time.monotonic()
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory() as scratch, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
        env=os.environ | {"TMPDIR": scratch},
    ) as process:  # fmt: skip
        assert process.stdout
        threading.Thread(target=_read_lines, args=(process.stdout, lines), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=every_s)
            except queue.Empty:
                size = (output_of("du", "-smc", str(venv), scratch) or "?").splitlines()[-1].split()[0]
                seconds = int(time.monotonic() - began)
                line = choose(f"Installing {what}: {seconds} s, {size} MB on the disk",
                              f"正在安装 {what}：{seconds} 秒，磁盘占用 {size} MB") + after  # fmt: skip
            print(before, line or "", sep="", end="", flush=True)
            if line is None:
                return process.wait()


def _read_lines(output: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in output:
        lines.put(line)
    lines.put(None)


if __name__ == "__main__":
    try:
        prepare_environment(Path(sys.argv[1]), [Path(file) for file in sys.argv[2:]])
    except ResidencyError as error:
        report(error)
        sys.exit(1)
