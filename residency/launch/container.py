"""Runs the app in a container: needs Docker, and for a GPU the NVIDIA Container Toolkit.

The container uses the host's network, so that addresses of this machine are valid inside and local requests are
recognized. A foreign container of the same name is kept under another name and renamed back at `stop`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from ..sentences import language
from .checks import check_disk
from .choose_gpu import Gpu, check_driver, choose_gpu, torch_of_pins
from .docker import (
    IMAGE_USER,
    LABEL,
    DockerContainer,
    build_command,
    docker,
    docker_succeeds,
    run_command,
    source_digest,
)
from .listening import check_port
from .options import LaunchSettings
from .readiness import become_app, follow_start, is_ready, report_plan, report_starting
from .terminal import LaunchError, become, fail, output_of, report, say, warn

_TORCH = (
    "import importlib.util, pathlib\n"
    "print(pathlib.Path(importlib.util.find_spec('torch').origin).with_name('version.py').read_text())"
)


class Container:
    """Actions for one container name; they return the exit code."""

    def __init__(self, settings: LaunchSettings) -> None:
        self.name = settings.container_name
        self.container = DockerContainer(self.name)
        self.kept = DockerContainer(f"{self.name}-before-gpu-management")  # foreign container replaced by ours
        self.aside = DockerContainer(f"{self.name}-replaced")  # our previous one, until its successor is ready
        self.given, self.settings, self.url = settings, settings, settings.url()
        if settings.action != "start":
            self._use_labels()

    def _use_labels(self) -> None:
        """Takes host, port and scheme from the labels of the existing container."""
        host, port, scheme = map(self.container.label, ("host", "port", "scheme"))
        settings = self.settings
        self.settings = replace(settings, host=host or settings.host, port=int(port or settings.port))
        self.url = self.settings.url(scheme == "https")

    # -- start ----------------------------------------------------------------------------------------------------

    def start(self) -> int:
        settings = self.settings
        gpu = choose_gpu(settings)
        if gpu.index and not (shutil.which("nvidia-container-runtime-hook") or shutil.which("nvidia-ctk")):
            toolkit = "NVIDIA Container Toolkit (docs.nvidia.com/datacenter/cloud-native/container-toolkit)"
            say(f"⚠️  Without the {toolkit}, docker cannot give the GPU to the container. For the CPU: GPU_ID=none",
                f"⚠️  未找到 {toolkit}，docker 无法向容器提供 GPU。使用 CPU 请设 GPU_ID=none")  # fmt: skip
        state = self.container.state
        self._check_name(state)
        file = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        lowest = int(file.read_text()) if file.exists() else 1024
        held = state.endswith(" running") and settings.port >= lowest  # maybe by the container to be replaced
        check_port(settings.host, 0 if held else settings.port, settings.named("HOST"), ("--host", "--port"), lowest)
        foreign = state.startswith("other")
        kept_restarts = self.container.restart_policy if foreign else self.container.label("kept-restarts")
        run, folders = run_command(settings, gpu, kept_restarts, self.url)
        build = self._build(gpu)
        if settings.check:
            self._report_plan(state, build, run, folders)
            return 0
        if build:
            if subprocess.run(build).returncode:
                fail("The image could not be built (see above): check network and disk space, and run this again",
                     "镜像构建失败（见上）：请检查网络与磁盘空间后重试")  # fmt: skip
            check_driver(gpu, self._torch_of_image(gpu), settings.image)
        for folder in folders:
            _make_folder(folder)
        self._free_name(state)
        return self._launch(run)

    def _build(self, gpu: Gpu) -> list[str]:
        """Returns the command that builds the image; empty if it is up to date. Checks driver and disk space."""
        settings, digest = self.settings, source_digest(self.settings)
        label = f'{{{{index .Config.Labels "{LABEL}.source"}}}}'
        if output_of("docker", "image", "inspect", "--format", label, settings.image) == digest:
            say(f"Image: {settings.image} is up to date", f"镜像：{settings.image} 已是最新")
            check_driver(gpu, self._torch_of_image(gpu), settings.image)
            return []
        if settings.base_image.startswith("python:"):  # other images contain torch
            check_driver(gpu, torch_of_pins(settings), settings.image)
        root = output_of("docker", "info", "--format", "{{.DockerRootDir}}") or ""
        if os.path.isdir(root):  # else the daemon is on another machine
            check_disk(root, "The image", "镜像")
        return build_command(settings, digest)

    def _torch_of_image(self, gpu: Gpu) -> str:
        """Returns the text of version.py of the image's torch; empty without a GPU."""
        if not gpu.index or not gpu.driver:
            return ""
        return output_of("docker", "run", "--rm", "--entrypoint", "python", self.settings.image, "-Ic", _TORCH) or ""

    def _check_name(self, state: str) -> None:
        """Raises `LaunchError` if the name is in use without --replace; an ended container of ours may be replaced."""
        name, kept = self.name, self.kept.name
        if state in ("absent", "ours exited", "ours created", "ours dead"):
            return
        if not self.settings.replace:
            status = state.partition(" ")[2]
            fail(f"There is already a container {name} ({status}). Give --replace to replace it, or --container-name",
                 f"已有容器 {name}（{status}）。用 --replace 替换它，或用 --container-name 换一个名字")  # fmt: skip
        if state.startswith("other") and self.container.inspect("{{.HostConfig.AutoRemove}}") == "true":
            fail(
                f"The container {name} was started with --rm: docker deletes it when it is stopped. If you can create "
                f"it again, stop it yourself (docker stop {name}) and run this again",
                f"容器 {name} 是用 --rm 启动的：一旦停止即被删除，无法保留。"
                f"如果能重新创建它，请自行停止（docker stop {name}），然后重新运行",
            )
        if state.startswith("other") and self.kept.exists:
            fail(f"This script did not start {name}, and {kept} exists: remove or rename one of them (docker rename)",
                 f"容器 {name} 不是由本脚本启动的，且 {kept} 已存在：请删除或重命名其一（docker rename）")  # fmt: skip

    def _report_plan(self, state: str, build: list[str], run: list[str], folders: list[str]) -> None:
        name = self.name
        if build:
            say(f"Would build: {shlex.join(build)}", f"将构建镜像：{shlex.join(build)}")
        if state.startswith("ours"):
            say(f"Would replace the container {name}", f"将替换容器 {name}")
        elif state.startswith("other"):
            say(f"Would stop {name} and keep it as {self.kept.name} until stop",
                f"将停止 {name}，并以 {self.kept.name} 保留至 stop")  # fmt: skip
        for folder in folders:
            if not os.path.isdir(folder):
                say(f"Would create the folder {folder}", f"将创建目录 {folder}")
        report_plan(self.settings, run, self.url)

    def _free_name(self, state: str) -> None:
        """Removes the container of this name, or stops it and gives it another name."""
        if state == "ours running" and self.settings.detach:
            if self.aside.exists:
                docker("rm", self.aside.name)
            self._stop_and_rename(self.aside.name)
        elif state.startswith("ours"):
            self._remove()
        elif state.startswith("other"):
            self._stop_and_rename(self.kept.name)
            say(f"Stopped {self.name}; it is kept as {self.kept.name}, and gets its name back after stop",
                f"已停止 {self.name}，并以 {self.kept.name} 保留；执行 stop 后恢复原名")  # fmt: skip

    def _launch(self, run: list[str]) -> int:
        say(f"Starting {self.url}", f"正在启动 {self.url}")
        if not self.settings.detach:
            become_app(run, self.settings, self.url, once_ready=self._hold_kept)
        if subprocess.run(run, stdout=subprocess.DEVNULL).returncode:
            if self.aside.is_ours:
                self._restore_previous()
            if self.container.is_ours:  # docker may have created it before the start failed
                self._remove()
            if self.kept.exists:
                self._give_name_back()
            fail("The container could not be started (see above)", "容器启动失败（见上）")
        self._hold_kept()
        if not self.aside.is_ours:
            return 0 if self._becomes_ready(falls_back=False) else 1
        if not self._becomes_ready():
            self._restore_previous()
        docker("rm", self.aside.name)
        return 0

    def _hold_kept(self) -> None:
        """Disables the restart policy of the kept container; called once ours runs, whose label records the policy."""
        if self.kept.exists and not docker_succeeds("update", "--restart", "no", self.kept.name):
            command = f"docker update --restart no {self.kept.name}"
            say(f"⚠️  {self.kept.name} may start at the next boot. To prevent it: {command}",
                f"⚠️  {self.kept.name} 可能在下次开机后自动启动。如需避免：{command}")  # fmt: skip

    def _stop(self) -> None:
        docker("stop", "-t", str(self.settings.stop_timeout), self.name)

    def _stop_and_rename(self, new: str) -> None:
        self._stop()
        if not docker_succeeds("rename", self.name, new):
            fail(f"{self.name} could not be renamed (see above), and is stopped: docker start {self.name}",
                 f"无法重命名 {self.name}（见上），它已停止：docker start {self.name}")  # fmt: skip

    def _becomes_ready(self, falls_back: bool = True) -> bool:
        """Waits; returns whether the app is ready. Prints the reason otherwise."""
        log, last_lines = self.settings.command("logs"), ["docker", "logs", "--tail", "20", self.name]
        try:
            follow_start(self.settings, self.url, log, last_lines, lambda: self.container.state == "ours running",
                         falls_back=falls_back)  # fmt: skip
        except LaunchError as error:
            report(error)
            return False
        return True

    def _restore_previous(self) -> NoReturn:
        """Gives our previous container its name back and starts it; ends with an error."""
        if self.container.is_ours:
            self._stop()
            docker("rm", self.name)
        docker("rename", self.aside.name, self.name)
        self._use_labels()
        self._start_again()

    def _start_again(self) -> NoReturn:
        """Starts the container that ran before; ends with an error."""
        name, port = self.name, self.settings.port
        warn(f"❌ The start has failed (see above). The previous container {name} is started again",
             f"❌ 启动失败（见上）。正在重新启动之前的容器 {name}")  # fmt: skip
        if docker_succeeds("start", name) and self._becomes_ready():
            fail(f"The start has failed (see above); the container {name} runs again with its previous settings",
                 f"启动失败，原因见上；容器 {name} 已按原设置恢复运行")  # fmt: skip
        logs, again = self.settings.command("logs"), self.settings.command("restart")
        fail(f"Container {name} is stopped: nothing runs on port {port} now. Log: {logs}. Try again: {again}",
             f"容器 {name} 已停止：端口 {port} 上没有服务。日志：{logs}。排除原因后请执行：{again}")  # fmt: skip

    def _give_name_back(self) -> None:
        docker("rename", self.kept.name, self.name)
        say(f"{self.name} is the old container again, stopped. To start it: docker start {self.name}",
            f"{self.name} 已恢复为原来的容器（已停止）。启动它：docker start {self.name}")  # fmt: skip

    def _remove(self) -> None:
        """Removes our container, after restoring the kept one's restart policy from its label."""
        policy = self.container.label("kept-restarts")
        if policy and self.kept.exists:
            docker("update", "--restart", policy, self.kept.name)
        self._stop()
        docker("rm", self.name)

    # -- other actions --------------------------------------------------------------------------------------------

    def stop(self) -> int:
        """Restores the state before the first start."""
        state = self.container.state
        if state.startswith("ours"):
            say(f"Stopping {self.name}; a running request may finish", f"正在停止 {self.name}；正在运行的请求可以完成")
            self._remove()
            say("Stopped", "已停止")
        elif state.startswith("other"):
            fail(f"The container {self.name} was not started by this script; it is not changed",
                 f"容器 {self.name} 不是由本脚本启动的，未做改动")  # fmt: skip
        else:
            say(f"There is no container {self.name}", f"没有容器 {self.name}")
        if not self.kept.exists:
            return 0
        if state == "absent" and self.kept.restart_policy.startswith("no"):
            # Our container, whose label recorded the policy, was removed by another program.
            command = f"docker update --restart unless-stopped {self.name}"
            say(f"⚠️  Its restart policy is unknown and is 'no' now. To restart it automatically: {command}",
                f"⚠️  原来的重启策略已无从得知，现为不自动重启。如需自动重启：{command}")  # fmt: skip
        self._give_name_back()
        return 0

    def status(self) -> int:
        """Returns 3 if the container does not run."""
        state = self.container.state
        owner, _, status = state.partition(" ")
        foreign_en, foreign_zh = (
            (", not started by this script", "，不是由本脚本启动的") if owner == "other" else ("", "")
        )
        say(f"Container {self.name}: {status or owner}{foreign_en}", f"容器 {self.name}：{status or owner}{foreign_zh}")
        if state != "ours running":
            return 3
        if report_starting(self.url):
            return 0
        command = ["docker", "exec", "--env", f"LC_ALL={language()}", self.name, "python", "-m", "gpu_manager"]
        return subprocess.run([*command, "status", "--url", self.url]).returncode

    def logs(self) -> int:
        become(["docker", "logs", "--tail", "100", *(["--follow"] if self.settings.follow else []), self.name])

    def restart(self) -> int:
        """Restarts with unchanged settings; a second try helps against transient causes only, such as a port in use."""
        name, settings = self.name, self.settings
        changes = {name for name, source in settings.sources.items() if source.startswith("-")}
        changes -= {"DOCKER", "CONTAINER_NAME", "READY_TIMEOUT", "STOP_TIMEOUT"}
        if self.given.port == settings.port:
            changes.discard("PORT")
        if changes or settings.arguments:
            fail("A container keeps the settings and arguments of its start; for others: start --docker --replace",
                 "容器保留启动时的设置与参数；如需更改请用：start --docker --replace")  # fmt: skip
        if not self.container.is_ours:
            fail(
                f"This script has started no container {name}: use start", f"没有由本脚本启动的容器 {name}：请用 start"
            )
        if docker_succeeds("restart", "-t", str(settings.stop_timeout), name) and self._becomes_ready():
            return 0
        if self.container.state != "ours running":
            self._start_again()
        if is_ready(self.url):
            fail(f"The container {name} was not restarted (see above), and still serves",
                 f"容器 {name} 未能重启（见上），仍照常提供服务")  # fmt: skip
        return 1


def _make_folder(path: str) -> None:
    """Creates a folder that is writable for the app; docker would create it for root only."""
    if os.path.isdir(path):
        return
    try:
        os.makedirs(path)
        if not os.geteuid():
            os.chown(path, IMAGE_USER, -1)
    except OSError as error:
        fail(f"{path} cannot be created ({error.strerror}): give another folder",
             f"无法创建 {path}（{error.strerror}）：请换一个目录")  # fmt: skip
