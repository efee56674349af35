"""The program behind ``start_with_gpu_management.sh``: ``python -m residency.launch ...``.

Needs only the standard library, so that any Python from 3.10 on can run it without an environment.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import ResidencyError
from .checks import check_settings
from .container import Container
from .docker import LABEL, DockerContainer, check_docker
from .options import PUBLIC, LaunchSettings, read, usage
from .process import Process
from .records import RecordFile
from .terminal import LaunchError, fail, output_of, report, say


def main(script: str, argv: list[str]) -> int:
    """Runs one action; returns the exit code. ``script`` is the name of this program in messages."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if {"--help", "-h"} & set(argv):
        print(usage())
        return 0
    try:
        code = _run(script, argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # for example `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ResidencyError as error:
        report(error)
        return 1
    except OSError as error:  # a full disk, no rights
        why = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        report(LaunchError(f"{why}. Check the disk space and the rights", f"{why}。请检查磁盘空间与权限"))
        return 1
    except KeyboardInterrupt:
        return 130


def _run(script: str, argv: list[str]) -> int:
    settings = read(argv, script)
    starts = settings.action == "start"
    if not starts:
        settings = _find_app(settings)
    if _in_container(settings):
        check_docker()
        app: Container | Process = Container(replace(settings, docker=True))
        checked = starts  # a restart changes no settings
    else:
        RecordFile(settings.run_dir, settings.port).report_damage()
        settings = settings if starts else _with_record(settings, argv)
        app, checked = Process(settings), starts or settings.action == "restart"
    if checked:
        _report_ignored(settings)
        check_settings(settings)
    return int(getattr(app, settings.action)())


def _running_apps(settings: LaunchSettings) -> Iterator[tuple[LaunchSettings, str, str, str]]:
    """Yields, for each app started by this program: settings, description (English, Chinese), start time."""
    for path in sorted(Path(settings.run_dir).glob("*.run")):
        record = RecordFile(settings.run_dir, int(path.stem)).read() if path.stem.isdecimal() else None
        if record and record.runs:
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
            yield replace(settings, port=int(path.stem)), f"pid {record.pid}", f"进程 {record.pid}", since
    for name in (output_of("docker", "ps", "--filter", f"label={LABEL}.port", "--format", "{{.Names}}") or "").split():
        container = DockerContainer(name)
        since = container.inspect("{{.State.StartedAt}}")[:16].replace("T", " ") + " UTC"
        found = replace(settings, port=int(container.label("port")), docker=True, container_name=name)
        yield found, f"container {name}", f"容器 {name}", since


def _find_app(settings: LaunchSettings) -> LaunchSettings:
    """Sets the port or container of the only matching app that runs; without one, returns the settings unchanged.

    Raises `LaunchError`, with a list, if there are several.
    """
    if settings.given("CONTAINER_NAME") and settings.sources["CONTAINER_NAME"] != "CONTAINER_NAME":
        return settings
    apps = [
        app
        for app in _running_apps(settings)
        if (app[0].docker or not settings.docker) and (not settings.given("PORT") or app[0].port == settings.port)
    ]
    if len(apps) < 2:
        return apps[0][0] if apps else settings
    en, zh = f"{len(apps)} apps are running. Choose one:", f"有 {len(apps)} 个应用正在运行，请指定其中一个："
    for found, what_en, what_zh, since in apps:
        command = found.command(settings.action)
        en += f"\n   port {found.port}, {what_en}, since {since}: {command}"
        zh += f"\n   端口 {found.port}，{what_zh}，始于 {since}：{command}"
    fail(en, zh)


def _in_container(settings: LaunchSettings) -> bool:
    """Returns whether --docker is given or, except for start, a container and no process serves the port."""
    if settings.docker or settings.action == "start" or not shutil.which("docker"):
        return settings.docker
    file = RecordFile(settings.run_dir, settings.port)
    file.check_owner()
    record, container = file.read(), DockerContainer(settings.container_name)
    other_port = settings.given("PORT") and container.label("port") != str(settings.port)
    if (record and record.runs) or other_port:
        return False
    state = container.state
    # The record of a process takes precedence over a stopped container.
    return state == "ours running" or (state.startswith("ours") and record is None)


def _with_record(found: LaunchSettings, argv: list[str]) -> LaunchSettings:
    """Merges given settings into those of the last start on that port; appends the arguments."""
    file = RecordFile(found.run_dir, found.port)
    file.check_owner()
    record = file.read()
    if record is None:
        if found.action == "restart":
            say(f"No previous start is recorded for port {found.port}: started with the settings given now",
                f"没有端口 {found.port} 上次启动的记录：按现在给出的设置启动")  # fmt: skip
        return found
    for name in PUBLIC:
        if not os.environ.get(name) and name in record.settings:
            os.environ[name] = record.settings[name]
    settings = read(argv, found.script, os.environ, record.settings, record.arguments)  # paths are of this folder
    try:
        os.chdir(record.folder)
    except OSError:
        if found.action == "restart":
            fail(f"The folder of the last start does not exist any more: {record.folder}",
                 f"上次启动时所在的目录已不存在：{record.folder}")  # fmt: skip
    return replace(settings, run_dir=found.run_dir, port=found.port)


def _report_ignored(settings: LaunchSettings) -> None:
    """Reports whether HOST and CONTAINER_NAME from the environment, also set by other programs, are used."""
    host = os.environ.get("HOST", "")
    if host and not settings.given("HOST"):
        say(f"The variable HOST ('{host}') is ignored: it is not an address. To set the address: --host or "
            "GPU_TTS_HOST",
            f"未采用环境变量 HOST（'{host}'）：它不是地址。如需在该处监听，请用 --host 或 GPU_TTS_HOST")  # fmt: skip
    if settings.sources.get("CONTAINER_NAME") == "CONTAINER_NAME":
        name = settings.container_name
        say(f"The container is called '{name}', from the variable CONTAINER_NAME. Another name: --container-name",
            f"容器名为 '{name}'，来自环境变量 CONTAINER_NAME。如需其他名字，请用 --container-name")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("python -m residency.launch", sys.argv[1:]))
