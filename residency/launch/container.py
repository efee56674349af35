"""Runs the app in a container: needs Docker, and for a GPU the NVIDIA Container Toolkit.

The container uses the host's network, so that addresses of this machine are valid inside and local requests are
recognized. A foreign container of the same name is kept under another name and renamed back at `stop`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from ..sentences import language
from .checks import cannot_listen, check_disk, check_port, port_in_use
from .choose_gpu import Gpu, check_driver, choose_gpu, torch_of_pins
from .container_run import build_command, make_folder, run_command, source_digest, warn_without_toolkit
from .docker import LABEL, DockerContainer, docker, docker_does
from .options import Given, LaunchSettings
from .service import address, await_ready, become_app, is_ready, reached_at, report_plan, report_ready
from .terminal import LaunchError, become, choose, fail, output_of, quoted, report, say, warn

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
        self.use(settings)

    def use(self, settings: LaunchSettings) -> None:
        self.settings = settings
        tls = settings.action != "start" and self.container.label("scheme") == "https"
        self.url = address(settings, tls)

    def as_noted(self) -> None:
        """Takes host and port from the labels of the existing container."""
        host, port = self.container.label("host"), self.container.label("port")
        self.use(replace(self.settings, host=host or self.settings.host, port=int(port or self.settings.port)))

    # -- start ----------------------------------------------------------------------------------------------------

    def start(self) -> int:
        settings = self.settings
        gpu = choose_gpu(settings)
        warn_without_toolkit(gpu)
        state = self.container.state
        self._check_name(state)
        self._check_port(state)
        # Restart policy of the kept container, restored by `stop`.
        ours = self.container
        kept_restarts = ours.restart_policy if state.startswith("other") else ours.label("kept-restarts")
        run = run_command(settings, gpu, kept_restarts, self.url)
        digest = source_digest(settings)
        label = f'{{{{index .Config.Labels "{LABEL}.source"}}}}'
        current = output_of("docker", "image", "inspect", "--format", label, settings.image) == digest
        if current:
            say(f"Image: {settings.image} is up to date", f"镜像：{settings.image} 已是最新")
            check_driver(gpu, self._torch_of_image(gpu), settings.image)
        else:
            if settings.base_image.startswith("python:"):  # other images contain torch
                check_driver(gpu, torch_of_pins(settings), settings.image)
            root = output_of("docker", "info", "--format", "{{.DockerRootDir}}") or ""
            if os.path.isdir(root):  # else the daemon is on another machine
                check_disk(root, "The image", "镜像")
        build = [] if current else build_command(settings, digest)
        if settings.check:
            self._report_plan(state, build, run.words, run.folders)
            return 0
        if build:
            if subprocess.run(build).returncode:
                fail("The image could not be built (see above): check network and disk space, and run this again",
                     "镜像构建失败（见上）：请检查网络与磁盘空间后重试")  # fmt: skip
            check_driver(gpu, self._torch_of_image(gpu), settings.image)
        for folder in run.folders:
            make_folder(folder)
        self._make_place(state)
        return self._launch(run.words)

    def _torch_of_image(self, gpu: Gpu) -> str:
        """Returns the text of version.py of the image's torch; empty without a GPU."""
        if not gpu.index or not gpu.driver:
            return ""
        return output_of("docker", "run", "--rm", "--entrypoint", "python", self.settings.image, "-Ic", _TORCH) or ""

    def _launch(self, run: list[str]) -> int:
        say(f"Starting {self.url}", f"正在启动 {self.url}")
        if not self.settings.detach:
            become_app(run, self.settings, self.url)
        if subprocess.run(run, stdout=subprocess.DEVNULL).returncode:
            if self.aside.is_ours:
                self._bring_back()
            if self.container.is_ours:  # docker may have created it before the start failed
                self._remove()
            if self.kept.exists:
                self._give_name_back()
            fail("The container could not be started (see above)", "容器启动失败（见上）")
        self._hold_kept()
        if not self.aside.is_ours:
            self._await()
            return 0
        if not self._serves():
            self._bring_back()
        docker("rm", self.aside.name)
        return 0

    def _check_name(self, state: str) -> None:
        """Raises `LaunchError` if the name is in use without --replace; an ended container of ours may be replaced."""
        name, kept = self.name, self.kept.name
        if state in ("absent", "ours exited", "ours created", "ours dead"):
            return
        if not self.settings.replace:
            status = state.partition(" ")[2]
            fail(f"There is a container {name} already ({status}). Give --replace to replace it, or --container-name",
                 f"已有容器 {name}（{status}）。用 --replace 替换它，或用 --container-name 换一个名字")  # fmt: skip
        if state.startswith("ours"):
            return
        if self.container.inspect("{{.HostConfig.AutoRemove}}") == "true":
            fail(
                f"The container {name} was started with --rm: docker deletes it once it is stopped. If it can be "
                f"made anew, stop it yourself (docker stop {name}) and run this again",
                f"容器 {name} 是用 --rm 启动的：一旦停止即被删除，无法保留。"
                f"如果能重新创建它，请自行停止（docker stop {name}），然后重新运行",
            )
        if self.kept.exists:
            fail(f"{name} is not of this script, and {kept} exists: remove or rename one of them (docker rename)",
                 f"容器 {name} 不是本脚本创建的，且 {kept} 已存在：请删除或重命名其一（docker rename）")  # fmt: skip

    def _check_port(self, state: str) -> None:
        """Checks the port, which may be held by the container to be replaced."""
        settings = self.settings
        if not state.endswith(" running"):
            try:
                socket.create_connection((reached_at(settings.host), settings.port), 5).close()
            except OSError:
                pass
            else:
                port_in_use(settings)
        file = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        lowest = int(file.read_text()) if file.exists() else 1024
        if settings.port < lowest:
            cannot_listen(settings, choose(f"the container has no rights to a port below {lowest}",
                                           f"容器无权使用低于 {lowest} 的端口"))  # fmt: skip
        check_port(settings, 0)

    def _report_plan(self, state: str, build: list[str], run: list[str], folders: list[str]) -> None:
        name = self.name
        if build:
            say(f"Would build: {quoted(build)}", f"将构建镜像：{quoted(build)}")
        if state.startswith("ours"):
            say(f"Would replace the container {name}", f"将替换容器 {name}")
        elif state.startswith("other"):
            say(f"Would stop {name} and keep it as {self.kept.name} until stop",
                f"将停止 {name}，并以 {self.kept.name} 保留至 stop")  # fmt: skip
        for folder in folders:
            if not os.path.isdir(folder):
                say(f"Would make the folder {folder}", f"将创建目录 {folder}")
        report_plan(replace(self.settings, detach=False), run, self.url)

    def _make_place(self, state: str) -> None:
        """Frees the name."""
        if state == "ours running" and self.settings.detach:
            if self.aside.exists:
                docker("rm", self.aside.name)
            self._stop_and_rename(self.aside.name)
        elif state.startswith("ours"):
            self._remove()
        elif state.startswith("other"):
            self._stop_and_rename(self.kept.name)
            say(f"Stopped {self.name}; it is kept as {self.kept.name}, and is back under its name after stop",
                f"已停止 {self.name}，并以 {self.kept.name} 保留；执行 stop 后恢复原名")  # fmt: skip

    def _stop(self) -> None:
        docker("stop", "-t", str(self.settings.stop_timeout), self.name)

    def _stop_and_rename(self, new: str) -> None:
        self._stop()
        if not docker_does("rename", self.name, new):
            fail(f"{self.name} could not be renamed (see above), and is stopped: docker start {self.name}",
                 f"无法重命名 {self.name}（见上），它已停止：docker start {self.name}")  # fmt: skip

    def _await(self) -> None:
        """Waits until the app is ready; raises `LaunchError` otherwise."""
        limit_s, logs, stop = self.settings.ready_timeout, self.settings.command("logs"), self.settings.command("stop")
        outcome = await_ready(self.url, limit_s, 0.5, lambda: self.container.state == "ours running")
        if outcome == "ready":
            report_ready(self.url, (logs, logs), (stop, stop))
        elif outcome == "ended":
            subprocess.run(["docker", "logs", "--tail", "20", self.name], stdout=sys.stderr)
            en = zh = ""
            if self.settings.action == "start" and not self.aside.is_ours:  # else it is restored automatically
                en, zh = f". Back to what was: {stop}", f"。恢复原状：{stop}"
            fail(f"The container ended while it started; the end of its log is above{en}",
                 f"容器在启动时退出；日志末尾见上{zh}")  # fmt: skip
        else:
            fail(f"It is not ready after {limit_s} s (READY_TIMEOUT), and goes on starting. Log: {logs}",
                 f"{limit_s} 秒后（READY_TIMEOUT）仍未就绪，启动继续进行。日志：{logs}")  # fmt: skip

    def _serves(self) -> bool:
        """Waits; returns whether the app is ready. Prints the reason otherwise."""
        try:
            self._await()
        except LaunchError as error:
            report(error)
            return False
        return True

    # -- a start that fails ---------------------------------------------------------------------------------------

    def _bring_back(self) -> NoReturn:
        """Restores and starts the previous container; ends with an error."""
        warn("❌ The start has failed (see above). The container that ran before is started again",
             "❌ 启动失败（见上）。正在重新启动之前运行的容器")  # fmt: skip
        if self.container.is_ours:
            self._stop()
            docker("rm", self.name)
        docker("rename", self.aside.name, self.name)
        self.as_noted()
        if docker_does("start", self.name) and self._serves():
            fail(f"The new container has failed; {self.name} is the one from before, with the settings that it had",
                 f"新容器启动失败，原因见上；{self.name} 为之前的容器，设置不变")  # fmt: skip
        self._is_down()

    def _is_down(self, en: str = "", zh: str = "") -> NoReturn:
        logs, port = self.settings.command("logs"), self.settings.port
        fail(f"The container {self.name} is down: nothing serves on port {port} now. Log: {logs}{en}",
             f"容器 {self.name} 已停止：端口 {port} 上目前没有服务。日志：{logs}{zh}")  # fmt: skip

    def _hold_kept(self) -> None:
        """Disables the restart policy of the kept container; called once ours runs, whose label records the policy."""
        if self.kept.exists and not docker_does("update", "--restart", "no", self.kept.name):
            command = f"docker update --restart no {self.kept.name}"
            say(f"⚠️  {self.kept.name} may be back after the next boot: {command}",
                f"⚠️  {self.kept.name} 可能在下次开机后自动启动：{command}")  # fmt: skip

    def _give_name_back(self) -> None:
        docker("rename", self.kept.name, self.name)
        say(f"{self.name} is the old container again, stopped: docker start {self.name}",
            f"{self.name} 已恢复为原来的容器（已停止）：docker start {self.name}")  # fmt: skip

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
            fail(f"The container {self.name} was not started by this script; it is left alone",
                 f"容器 {self.name} 不是由本脚本启动的，未做改动")  # fmt: skip
        else:
            say(f"There is no container {self.name}", f"没有容器 {self.name}")
        if not self.kept.exists:
            return 0
        if state == "absent" and self.kept.restart_policy.startswith("no"):
            # Our container, whose label recorded the policy, was removed by another program.
            command = f"docker update --restart unless-stopped {self.name}"
            say(f"⚠️  How it was restarted is not known any more, and it is not now: {command}",
                f"⚠️  原来的重启策略已无从得知，现为不自动重启：{command}")  # fmt: skip
        self._give_name_back()
        return 0

    def status(self) -> int:
        """Returns 3 if the container does not run."""
        state = self.container.state
        say(f"Container {self.name}: {state}", f"容器 {self.name}：{state}")
        if state != "ours running":
            return 3
        if not is_ready(self.url):
            say("Not ready yet, or on its way out", "尚未就绪，或正在退出")
            return 0
        asked = ["docker", "exec", "--env", f"LC_ALL={language()}", self.name, "python", "-m", "gpu_manager"]
        return subprocess.run([*asked, "status", "--url", self.url]).returncode

    def logs(self) -> int:
        become(["docker", "logs", "--tail", "100", *(["--follow"] if self.settings.follow else []), self.name])

    def check_restart(self, given: Given) -> None:
        """Raises `LaunchError` if settings or arguments are given: a container cannot change them."""
        changes = {name for name in given.texts if given.sources[name].startswith("-")}
        changes -= {"DOCKER", "CONTAINER_NAME", "READY_TIMEOUT", "STOP_TIMEOUT"}
        if given.texts.get("PORT") == str(self.settings.port):
            changes.discard("PORT")
        if changes or given.arguments:
            fail("A container keeps the settings and arguments of its start; for others: start --docker --replace",
                 "容器保留启动时的设置与参数；如需更改请用：start --docker --replace")  # fmt: skip

    def restart(self) -> int:
        """Restarts with unchanged settings; a second try helps against transient causes only, such as a port in use."""
        name, again = self.name, self.settings.command("restart")
        if not self.container.is_ours:
            fail(f"This script has made no container {name}: start it", f"没有由本脚本创建的容器 {name}：请先启动")
        if docker_does("restart", "-t", str(self.settings.stop_timeout), name) and self._serves():
            return 0
        if self.container.state == "ours running":
            if is_ready(self.url):
                fail(f"The container {name} was not restarted (see above), and serves as before",
                     f"容器 {name} 未能重启（见上），仍照常提供服务")  # fmt: skip
            return 1
        warn(f"❌ The restart has failed (see above). The container {name} is started once more",
             f"❌ 重启失败（见上）。正在再次启动容器 {name}")  # fmt: skip
        if docker_does("start", name) and self._serves():
            fail(f"The restart has failed (see above); the container {name} serves again, as before",
                 f"重启失败，原因见上；容器 {name} 已恢复服务，设置不变")  # fmt: skip
        self._is_down(f". Once the cause is mended: {again}", f"。排除原因后请执行：{again}")
