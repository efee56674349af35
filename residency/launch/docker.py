"""Calls of docker: containers by name, build of the image, and run with GPU, rights and folders.

Folders have the same paths inside and outside, so that arguments need no translation.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from .choose_gpu import Gpu
from .options import OF_APP, LaunchSettings, absolute
from .terminal import fail, output_of, quoted

LABEL = "gpu-managed-tts"
IMAGE_USER = 10001  # in the Dockerfile
_FOLDERS = ("--tmp-dir", "--asr-model", "--tts-model-id", "--tokenizer-model-id", "--ssl-certfile", "--ssl-keyfile")


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


@dataclass
class RunCommand:
    """``docker run``, and the folders to create before it."""

    words: list[str]
    folders: list[str] = field(default_factory=list)

    def mount(self, path: str, writable: bool = False) -> None:
        """Mounts a folder or file. Raises `LaunchError` if the user inside has no access."""
        if writable:
            _check_inside(path, 7, f"chown -R {IMAGE_USER}")
            self.folders.append(path)
        elif os.path.isfile(path):
            _check_inside(path, 4, f"chown {IMAGE_USER}")  # not chmod: it may be a private key
        else:
            _check_inside(path, 5, "chmod -R o+rX")
        self.words += ["--volume", f"{path}:{path}{'' if writable else ':ro'}"]


def run_command(settings: LaunchSettings, gpu: Gpu, kept_restarts: str, url: str) -> RunCommand:
    """Builds ``docker run``. ``kept_restarts``: restart policy of the kept container, stored as a label."""
    labels = {"host": settings.host, "port": settings.port}
    labels |= {"scheme": "https"} if url.startswith("https") else {}
    labels |= {"kept-restarts": kept_restarts.removesuffix(":0")} if kept_restarts else {}
    run = RunCommand(["docker", "run", "--name", settings.container_name, "--init", "--network", "host"])
    run.words += [word for name, text in labels.items() for word in ("--label", f"{LABEL}.{name}={text}")]
    run.words += ["--security-opt", "no-new-privileges", "--cap-drop", "ALL"]
    run.words += ["--stop-timeout", str(settings.stop_timeout)]
    if settings.detach:
        run.words += ["--detach", "--restart", "unless-stopped"]
    if os.geteuid():  # files belong to this user; for root, to the image's user
        run.words += ["--user", f"{os.geteuid()}:{os.getegid()}", "--env", "HOME=/tmp"]
        for group in sorted({os.getegid(), *os.getgroups()}):
            run.words += ["--group-add", str(group)]
    if gpu.index:
        run.words += ["--gpus", f'"device={gpu.index}"']
    if os.path.isdir(settings.model_path):  # else a hub id
        run.mount(settings.model_path)
    if settings.model_path or "--enable-auto-transcribe" in settings.arguments:
        run.words += ["--volume", "gpu-managed-tts-hub:/hub"]  # downloads outlive the container
    if settings.step_audio_root:
        run.mount(settings.step_audio_root)
    if settings.gpu_snapshot_dir:
        run.mount(settings.gpu_snapshot_dir, writable=True)
    arguments = tuple(_with_folders(settings, run))
    for variable in (*OF_APP, "HF_TOKEN", "HF_ENDPOINT"):  # by name: values would appear in the process list
        run.words += ["--env", variable]
    run.words += ["--env", f"HEALTH_URL={url}/healthz", settings.image]
    run.words += replace(settings, arguments=arguments).app_arguments()
    return run


def _with_folders(settings: LaunchSettings, run: RunCommand) -> Iterator[str]:
    """Yields the arguments of app.py with absolute paths, and mounts their folders."""
    before = ""
    for word in settings.arguments:
        flag, equals, value = word.partition("=") if word.startswith("--") else (before, "", word)
        before = word
        path = absolute(value)
        is_file = flag.startswith("--ssl-") and os.path.isfile(path)
        if flag in _FOLDERS and flag != word and (flag == "--tmp-dir" or os.path.isdir(path) or is_file):
            run.mount(path, writable=flag == "--tmp-dir")
            yield f"{flag}={path}" if equals else path
        else:
            yield word  # also a hub id


def _check_inside(path: str, rights: int, command: str) -> None:
    """Checks, for root, that the image's user has the rights (bits as in a mode). Raises `LaunchError`."""
    if os.geteuid() or not os.path.exists(path):
        return
    facts = os.stat(path)
    mode = facts.st_mode >> 6 if facts.st_uid == IMAGE_USER else facts.st_mode
    if mode & rights != rights:
        command = f"{command} {quoted([path])}"
        fail(
            f"The user {IMAGE_USER}, which runs the app in the container, has no access to {path}: {command}, or run "
            f"this as the owner",
            f"容器中的应用以用户 {IMAGE_USER} 运行，该用户无权使用 {path}：请执行 {command}，或以其所有者身份启动",
        )
