"""Calls of docker, and the state of a container."""

from __future__ import annotations

import shutil
import subprocess

from .terminal import fail, output_of

LABEL = "gpu-managed-tts"


def docker_does(*words: str) -> bool:
    """Runs docker, with its errors on stderr; returns whether it succeeded."""
    return subprocess.run(["docker", *words], stdout=subprocess.DEVNULL).returncode == 0


def docker(*words: str) -> None:
    """Runs docker; raises `LaunchError` if it fails."""
    if not docker_does(*words):
        fail(f"docker {words[0]} has failed (see above)", f"docker {words[0]} 失败（见上）")


def check_docker() -> None:
    """Raises `LaunchError` if docker is missing or its daemon does not respond."""
    if not shutil.which("docker"):
        guide = "https://docs.docker.com/engine/install/"
        fail(f"docker is not here: install it ({guide}), or start without --docker",
             f"找不到 docker：请安装（{guide}），或不使用 --docker")  # fmt: skip
    done = subprocess.run(["docker", "info"], capture_output=True, text=True, errors="replace")
    if done.returncode:
        why, start = done.stderr.partition("\n")[0], "sudo systemctl start docker"
        fail(f"docker does not answer: {why}. Start its daemon ({start}), or let this user use it (group docker)",
             f"docker 无响应（{why}）：请启动其服务（{start}），或将当前用户加入 docker 组")  # fmt: skip


class DockerContainer:
    """Container by name; it may not exist."""

    def __init__(self, name: str) -> None:
        self.name = name

    def inspect(self, template: str) -> str:
        """Formats its description by a template; returns an empty string if the container does not exist."""
        said = output_of("docker", "container", "inspect", "--format", template, self.name) or ""
        return said.replace("<no value>", "")

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
