"""The program behind ``start_with_gpu_management.sh``: ``python -m residency.launch ...``.

Needs only the standard library, so that any Python from 3.10 on can run it without an environment.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import replace

from ..errors import ResidencyError
from .checks import check_settings
from .container import Container
from .docker import DockerContainer, check_docker
from .finding import find_app
from .options import PUBLIC, Given, LaunchSettings, read, settle
from .records import RecordFile
from .restart import restart
from .service import Service
from .terminal import fail, report, say
from .usage import usage


def main(script: str, argv: list[str]) -> int:
    """Runs one action; returns the exit code. ``script`` is the name of this program in messages."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if {"--help", "-h"} & set(argv):
        print(usage())
        return 0
    try:
        code = _run(script, read(argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # for example `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ResidencyError as error:
        report(error)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(script: str, given: Given) -> int:
    settings = settle(given, script)
    started_before = given.action != "start"
    own_name = given.has("CONTAINER_NAME") and given.sources["CONTAINER_NAME"] != "CONTAINER_NAME"
    if started_before and not own_name:
        settings = find_app(settings, given.has("PORT"))
    if _in_container(settings, given.has("PORT")):
        check_docker()
        container = Container(replace(settings, docker=True))
        if started_before:
            container.as_noted()
        if given.action == "restart":
            container.check_restart(given)
        if given.action == "start":
            _report_ignored(given, settings)
            check_settings(settings)
        return int(getattr(container, given.action)())
    RecordFile(settings.run_dir, settings.port).report_damage()
    settings = _with_record(given, settings, script) if started_before else settings
    if given.action in ("start", "restart"):
        _report_ignored(given, settings)
        check_settings(settings)
    service = Service(settings)
    return restart(service) if given.action == "restart" else int(getattr(service, given.action)())


def _in_container(settings: LaunchSettings, port_given: bool) -> bool:
    """Returns whether --docker is given or, except for start, a container and no process serves the port."""
    if settings.docker or settings.action == "start" or not shutil.which("docker"):
        return settings.docker
    file = RecordFile(settings.run_dir, settings.port)
    file.check_owner()
    record, container = file.read(), DockerContainer(settings.container_name)
    if (record and record.lives) or (port_given and container.label("port") != str(settings.port)):
        return False
    state = container.state
    # The record of a process takes precedence over a stopped container.
    return state == "ours running" or (state.startswith("ours") and record is None)


def _with_record(given: Given, found: LaunchSettings, script: str) -> LaunchSettings:
    """Merges given settings into those of the last start on that port; appends the arguments."""
    file = RecordFile(found.run_dir, found.port)
    file.check_owner()
    record = file.read()
    if record is None:
        if given.action == "restart":
            say(f"Nothing is known of an earlier start on port {found.port}: started with what is given now",
                f"没有端口 {found.port} 上次启动的设置：按现在给出的设置启动")  # fmt: skip
        return found
    for name in PUBLIC:
        if not os.environ.get(name) and name in record.settings:
            os.environ[name] = record.settings[name]
    try:
        os.chdir(record.folder)
    except OSError:
        if given.action == "restart":
            fail(f"The folder that it was started in is gone: {record.folder}",
                 f"启动时所在的目录已不存在：{record.folder}")  # fmt: skip
    given = replace(given, arguments=record.arguments + given.arguments)
    return replace(settle(given, script, record.settings), run_dir=found.run_dir, port=found.port)


def _report_ignored(given: Given, settings: LaunchSettings) -> None:
    """Reports whether HOST and CONTAINER_NAME from the environment, also set by other programs, are used."""
    host = os.environ.get("HOST", "")
    if host and not given.has("HOST"):
        say(f"The variable HOST ('{host}') is not read: it is no address. To listen there: --host or GPU_TTS_HOST",
            f"未采用环境变量 HOST（'{host}'）：它不是地址。如需在该处监听，请用 --host 或 GPU_TTS_HOST")  # fmt: skip
    if given.sources.get("CONTAINER_NAME") == "CONTAINER_NAME":
        name = settings.container_name
        say(f"The container is called '{name}', as the variable CONTAINER_NAME says. Another name: --container-name",
            f"容器名为 '{name}'，来自环境变量 CONTAINER_NAME。如需其他名字，请用 --container-name")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("python -m residency.launch", sys.argv[1:]))
