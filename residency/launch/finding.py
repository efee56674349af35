"""Finds the app that stop, status, logs and restart are for."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from .container import Container
from .docker import LABEL, DockerContainer
from .options import LaunchSettings
from .records import RecordFile
from .service import Service
from .terminal import LaunchError, output_of


@dataclass(frozen=True)
class RunningApp:
    """``pid`` is 0 and ``name`` set for one in a container."""

    port: int
    since: str
    pid: int = 0
    name: str = ""


def _running_apps(settings: LaunchSettings) -> list[RunningApp]:
    """Those that this program has started."""
    found = []
    for path in sorted(Path(settings.run_dir).glob("*.run")):
        record = RecordFile(settings.run_dir, int(path.stem)).read() if path.stem.isdecimal() else None
        if record and record.lives:
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
            found.append(RunningApp(int(path.stem), since, pid=record.pid))
    names = output_of("docker", "ps", "--filter", f"label={LABEL}.port", "--format", "{{.Names}}") or ""
    for name in names.split():
        container = DockerContainer(name)
        since = container.inspect("{{.State.StartedAt}}")[:16].replace("T", " ") + " UTC"
        port = container.label("port")
        found.append(RunningApp(int(port) if port.isdecimal() else 0, since, name=name))
    return found


def find_app(settings: LaunchSettings, port_given: bool, script: str) -> LaunchSettings:
    """The settings with the port or the container of the one app that runs, and may be meant.

    `LaunchError` names all if there are several; where none runs, the settings stay what they are.
    """
    apps = [
        app
        for app in _running_apps(settings)
        if (app.name or not settings.docker) and (not port_given or app.port == settings.port)
    ]
    if not apps:
        return settings
    if len(apps) == 1:
        return _of(settings, apps[0])
    en, zh = f"{len(apps)} apps run. Name one:", f"有 {len(apps)} 个应用正在运行，请指定其中一个："
    for app in apps:
        meant = _of(settings, app)
        command = (Container if app.name else Service)(meant, script).command(settings.action)
        what = (f"container {app.name}", f"容器 {app.name}") if app.name else (f"pid {app.pid}", f"进程 {app.pid}")
        en += f"\n   port {app.port}, {what[0]}, since {app.since}: {command}"
        zh += f"\n   端口 {app.port}，{what[1]}，始于 {app.since}：{command}"
    raise LaunchError(en, zh)


def _of(settings: LaunchSettings, app: RunningApp) -> LaunchSettings:
    if app.name:
        return replace(settings, port=app.port, docker=True, container_name=app.name)
    return replace(settings, port=app.port)
