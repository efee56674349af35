"""Commands for docker: build of the image, and run with GPU, rights and folders.

Folders have the same paths inside and outside, so that arguments need no translation.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from .checks import app_arguments
from .choose_gpu import Gpu
from .docker import LABEL
from .options import OF_APP, LaunchSettings, absolute
from .terminal import fail, output_of, quoted, say

IMAGE_USER = 10001  # in the Dockerfile
_FOLDERS = ("--tmp-dir", "--asr-model", "--tts-model-id", "--tokenizer-model-id", "--ssl-certfile", "--ssl-keyfile")


def build_command(settings: LaunchSettings, digest: str) -> list[str]:
    """Returns ``docker build``. Passes package indexes by variable name, since they may contain a password."""
    arguments = [f"BASE_IMAGE={settings.base_image}", f"TORCH_INDEX_URL={os.environ.get('TORCH_INDEX_URL', '')}"]
    arguments += ["PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"]
    words = ["docker", "build", "--tag", settings.image, "--label", f"{LABEL}.source={digest}"]
    return [*words, *(word for each in arguments for word in ("--build-arg", each)), settings.project_dir]


def source_digest(settings: LaunchSettings) -> str:
    """Returns a digest of the sources of the image."""
    project, base = Path(settings.project_dir), settings.base_image
    digest = hashlib.sha256(f"{base}\n{os.environ.get('TORCH_INDEX_URL', '')}\n".encode())
    if not base.startswith("python:"):  # a local image may have been rebuilt
        digest.update((output_of("docker", "image", "inspect", "--format", "{{.Id}}", base) or "").encode())
    folders = [project / "scripts", project / "residency"]
    files = [project / "Dockerfile", project / "requirements.txt", project / "pyproject.toml", *project.glob("*.py")]
    files += [file for folder in folders for file in folder.rglob("*") if "__pycache__" not in file.parts]
    for file in sorted(files):
        if file.is_file():
            digest.update(f"{file.relative_to(project)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@dataclass
class RunCommand:
    """``docker run``, and the folders to create before it."""

    words: list[str]
    folders: list[str] = field(default_factory=list)

    def give(self, path: str, writable: bool = False) -> None:
        """Mounts a folder or file. Raises `LaunchError` if the user inside has no access."""
        if writable:
            _check_inside(path, "rwx", f"chown -R {IMAGE_USER}")
            self.folders.append(path)
            self.words += ["--volume", f"{path}:{path}"]
            return
        if os.path.isfile(path):
            _check_inside(path, "r", f"chown {IMAGE_USER}")  # not chmod: it may be a private key
        else:
            _check_inside(path, "rx", "chmod -R o+rX")
        self.words += ["--volume", f"{path}:{path}:ro"]


def run_command(settings: LaunchSettings, gpu: Gpu, kept_restarts: str, url: str) -> RunCommand:
    """Builds ``docker run``. ``kept_restarts``: restart policy of the kept container, stored as a label."""
    name, host, port = settings.container_name, settings.host, settings.port
    run = RunCommand(["docker", "run", "--name", name, "--label", f"{LABEL}.host={host}"])
    run.words += ["--label", f"{LABEL}.port={port}", "--init", "--network", "host"]
    run.words += ["--security-opt", "no-new-privileges", "--cap-drop", "ALL"]
    run.words += ["--stop-timeout", str(settings.stop_timeout)]
    if settings.detach:
        run.words += ["--detach", "--restart", "unless-stopped"]
    if url.startswith("https"):
        run.words += ["--label", f"{LABEL}.scheme=https"]
    if kept_restarts:
        run.words += ["--label", f"{LABEL}.kept-restarts={kept_restarts.removesuffix(':0')}"]
    if os.geteuid():  # files belong to this user; for root, to the image's user
        run.words += ["--user", f"{os.geteuid()}:{os.getegid()}", "--env", "HOME=/tmp"]
        for group in sorted({os.getegid(), *os.getgroups()}):
            run.words += ["--group-add", str(group)]
    if gpu.index:
        run.words += ["--gpus", f'"device={gpu.index}"']
    if os.path.isdir(settings.model_path):  # else a hub id
        run.give(settings.model_path)
    if settings.model_path or "--enable-auto-transcribe" in settings.arguments:
        run.words += ["--volume", "gpu-managed-tts-hub:/hub"]  # downloads outlive the container
    if settings.step_audio_root:
        run.give(settings.step_audio_root)
    if settings.gpu_snapshot_dir:
        run.give(settings.gpu_snapshot_dir, writable=True)
    arguments = tuple(_with_folders(settings, run))
    for variable in (*OF_APP, "HF_TOKEN", "HF_ENDPOINT"):  # by name: values would appear in the process list
        run.words += ["--env", variable]
    run.words += ["--env", f"HEALTH_URL={url}/healthz", settings.image]
    run.words += app_arguments(replace(settings, arguments=arguments))
    return run


def _with_folders(settings: LaunchSettings, run: RunCommand) -> Iterator[str]:
    """Yields the arguments of app.py with absolute paths, and mounts their folders."""
    before = ""
    for word in settings.arguments:
        flag, equals, value = word.partition("=") if word.startswith("--") else (before, "", word)
        before = word
        path = absolute(value)
        if flag not in _FOLDERS or flag == word:
            yield word
        elif flag == "--tmp-dir" or os.path.isdir(path) or (flag.startswith("--ssl-") and os.path.isfile(path)):
            run.give(path, writable=flag == "--tmp-dir")
            yield f"{flag}={path}" if equals else path
        else:
            yield word  # a hub id


def _check_inside(path: str, rights: str, mend: str) -> None:
    """Checks, for root, that the image's user has the rights. Raises `LaunchError`."""
    if os.geteuid() or not os.path.exists(path):
        return
    facts, bits = os.stat(path), sum({"r": 4, "w": 2, "x": 1}[right] for right in rights)
    mode = facts.st_mode >> 6 if facts.st_uid == IMAGE_USER else facts.st_mode
    if mode & bits != bits:
        command = f"{mend} {quoted([path])}"
        fail(
            f"{path} is closed to the user {IMAGE_USER}, who runs the app in the container: {command}, or start this "
            f"as its owner",
            f"容器中的应用以用户 {IMAGE_USER} 运行，该用户无权使用 {path}：请执行 {command}，或以其所有者身份启动",
        )


def make_folder(path: str) -> None:
    """Creates a folder that is writable for the app; docker would create it for root only."""
    if os.path.isdir(path):
        return
    try:
        os.makedirs(path)
        if not os.geteuid():
            os.chown(path, IMAGE_USER, -1)
    except OSError as error:
        fail(f"{path} cannot be made ({error.strerror}): give another folder",
             f"无法创建 {path}（{error.strerror}）：请换一个目录")  # fmt: skip


def warn_without_toolkit(gpu: Gpu) -> None:
    if gpu.index and not (shutil.which("nvidia-container-runtime-hook") or shutil.which("nvidia-ctk")):
        guide = "https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/"
        say(f"⚠️  Without the NVIDIA Container Toolkit docker gives no GPU to a container ({guide}); or GPU_ID=none",
            f"⚠️  未找到 NVIDIA Container Toolkit，docker 无法向容器提供 GPU（{guide}）；或设 GPU_ID=none")  # fmt: skip
