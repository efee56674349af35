"""Calls of docker: containers by name, build of the image, and run with GPU, rights and folders.

Folders have the same paths inside and outside, so that arguments need no translation.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .choose_gpu import Gpu
from .options import OF_APP, LaunchSettings, absolute, is_url
from .terminal import fail, output_of

LABEL = "gpu-managed-tts"
IMAGE_USER = 10001  # in the Dockerfile
_FOLDERS = (
    "--tmp-dir", "--asr-model", "--tts-model-id", "--tokenizer-model-id", "--tokenizer-path", "--ssl-certfile",
    "--ssl-keyfile", "--voices-dir",
)  # fmt: skip


def docker_succeeds(*words: str) -> bool:
    """Runs docker, with its errors on stderr; returns whether it succeeded."""
    return subprocess.run(["docker", *words], stdout=subprocess.DEVNULL).returncode == 0


def docker(*words: str) -> None:
    """Runs docker; raises `LaunchError` if it fails."""
    if not docker_succeeds(*words):
        fail(f"docker {words[0]} has failed (see above)", f"docker {words[0]} 失败（见上）")


def check_docker() -> None:
    """Raises `LaunchError` if docker is missing or its daemon does not respond."""
    if not shutil.which("docker"):
        guide = "https://docs.docker.com/engine/install/"
        fail(f"docker is not installed: install it ({guide}), or start without --docker",
             f"找不到 docker：请安装（{guide}），或不使用 --docker")  # fmt: skip
    done = subprocess.run(["docker", "info"], capture_output=True, text=True, errors="replace")
    if done.returncode:
        why, start = done.stderr.partition("\n")[0], "sudo systemctl start docker"
        fail(f"docker does not respond: {why}. Start its daemon ({start}), or add this user to the group docker",
             f"docker 无响应（{why}）：请启动其服务（{start}），或将当前用户加入 docker 组")  # fmt: skip


class DockerContainer:
    """Container by name; it may not exist."""

    def __init__(self, name: str) -> None:
        self.name = name

    def inspect(self, template: str) -> str:
        """Formats its description by a template; returns an empty string if the container does not exist."""
        text = output_of("docker", "container", "inspect", "--format", template, self.name) or ""
        return text.replace("<no value>", "")

    def label(self, label: str) -> str:
        """Returns a label set by this program: host, port, scheme, kept-restarts."""
        return self.inspect(f'{{{{index .Config.Labels "{LABEL}.{label}"}}}}')

    @property
    def state(self) -> str:
        """``absent``, or ``ours`` or ``other`` followed by docker's state."""
        if not (status := self.inspect("{{.State.Status}}")):
            return "absent"
        return f"{'ours' if self.label('port').isdecimal() else 'other'} {status}"

    @property
    def exists(self) -> bool:
        return self.state != "absent"

    @property
    def is_ours(self) -> bool:
        return self.state.startswith("ours")

    @property
    def restart_policy(self) -> str:
        return self.inspect("{{.HostConfig.RestartPolicy.Name}}:{{.HostConfig.RestartPolicy.MaximumRetryCount}}")


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
    files = [project / "Dockerfile", project / "requirements.txt", project / "pyproject.toml", *project.glob("*.py")]
    files += [file for folder in ("scripts", "residency") for file in (project / folder).rglob("*")]
    for file in sorted(files):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(project)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def run_command(settings: LaunchSettings, gpu: Gpu, kept_restarts: str, url: str) -> tuple[list[str], list[str]]:
    """Returns ``docker run``, and the folders to create before it.

    ``kept_restarts`` is the restart policy of the kept container, stored as a label. Raises `LaunchError` if the user
    inside has no access to a folder.
    """
    mounts = list(dict.fromkeys(_mounts(settings)))
    folders = [path for path, writable in mounts if writable]
    labels = {"host": settings.host, "port": settings.port}
    labels |= {"scheme": "https"} if url.startswith("https") else {}
    labels |= {"kept-restarts": kept_restarts.removesuffix(":0")} if kept_restarts else {}
    options = [("--label", f"{LABEL}.{name}={text}") for name, text in labels.items()]
    if os.geteuid():  # files belong to this user; for root, to the image's user
        options += [("--user", f"{os.geteuid()}:{os.getegid()}"), ("--env", "HOME=/tmp")]
        options += [("--group-add", str(group)) for group in sorted({os.getegid(), *os.getgroups()})]
    if gpu.index:
        options += [("--gpus", f'"device={gpu.index}"')]
    if voices := os.environ.get("GPU_TTS_VOICES_DIR"):
        options += [("--env", f"GPU_TTS_VOICES_DIR={absolute(voices)}")]
    elif not settings.app_argument("--voices-dir"):
        options += [("--volume", "gpu-managed-tts-voices:/voices")]  # outlives the container
    if settings.model_path or "--enable-auto-transcribe" in settings.arguments:
        options += [("--volume", "gpu-managed-tts-hub:/hub")]  # downloads outlive the container
    options += [("--volume", f"{path}:{path}{'' if writable else ':ro'}") for path, writable in mounts]
    # By name: values would appear in the process list.
    options += [("--env", variable) for variable in (*OF_APP, "HF_TOKEN", "HF_ENDPOINT")]
    return [
        *("docker", "run", "--name", settings.container_name, "--init", "--network", "host", "--cap-drop", "ALL"),
        *("--security-opt", "no-new-privileges", "--stop-timeout", str(settings.stop_timeout)),
        *(("--detach", "--restart", "unless-stopped") if settings.detach else ()),
        *(word for option in options for word in option),
        *("--env", f"HEALTH_URL={url}/healthz", settings.image),
        *replace(settings, arguments=tuple(word for word, _, _ in _arguments(settings))).app_arguments(),
    ], folders


def _arguments(settings: LaunchSettings) -> Iterator[tuple[str, str, bool]]:
    """Yields each argument of app.py, the folder or file to mount for it, if any, and whether that is writable."""
    before = ""
    for word in settings.arguments:
        flag, equals, value = word.partition("=") if word.startswith("--") else (before, "", word)
        before, path, writable = word, absolute(value), flag in ("--tmp-dir", "--voices-dir")
        exists = os.path.isdir(path) or (flag.startswith("--ssl-") and os.path.isfile(path))  # else a hub id
        if flag in _FOLDERS and flag != word and (exists or writable):
            yield f"{flag}={path}" if equals else path, path, writable
        else:
            yield word, "", False


def _mounts(settings: LaunchSettings) -> Iterator[tuple[str, bool]]:
    """Yields folders and files to mount, and whether they are writable. Raises `LaunchError`, see `run_command`."""
    model_path = settings.model_path if os.path.isdir(settings.model_path) else ""  # else a hub id
    beside = Path(model_path).parent / "Step-Audio-Tokenizer"  # where checkouts of 2026 look for it
    tokenizer = str(beside) if model_path and beside.is_dir() else ""
    read_only = [(path, False) for path in (model_path, tokenizer, settings.step_audio_root)]
    voices = os.environ.get("GPU_TTS_VOICES_DIR")
    mounts = [*read_only, (settings.gpu_snapshot_dir, True), (absolute(voices) if voices else "", True)]
    for path, writable in (*mounts, *((path, writable) for _, path, writable in _arguments(settings))):
        if path and not is_url(path):
            _check_inside(path, writable)
            yield path, writable


def _check_inside(path: str, writable: bool) -> None:
    """Checks, for root, that the image's user has the rights. Raises `LaunchError`."""
    if os.geteuid() or not os.path.exists(path):
        return
    rights, command = (7, f"chown -R {IMAGE_USER}") if writable else (5, "chmod -R o+rX")
    if os.path.isfile(path):
        rights, command = 4, f"chown {IMAGE_USER}"  # not chmod: it may be a private key
    facts = os.stat(path)
    mode = facts.st_mode >> 6 if facts.st_uid == IMAGE_USER else facts.st_mode
    if mode & rights != rights:
        command = f"{command} {shlex.quote(path)}"
        fail(
            f"The user {IMAGE_USER}, which runs the app in the container, has no access to {path}: {command}, or run "
            f"this as the owner",
            f"容器中的应用以用户 {IMAGE_USER} 运行，该用户无权使用 {path}：请执行 {command}，或以其所有者身份启动",
        )
