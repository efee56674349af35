"""Finds the target app of stop, status, logs and restart."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .docker import LABEL, DockerContainer
from .options import LaunchSettings
from .records import RecordFile
from .terminal import fail, output_of


def _running_apps(settings: LaunchSettings) -> Iterator[tuple[LaunchSettings, str, str, str]]:
    """Yields, for each app started by this program: settings, description (English, Chinese), start time."""
    for path in sorted(Path(settings.run_dir).glob("*.run")):
        record = RecordFile(settings.run_dir, int(path.stem)).read() if path.stem.isdecimal() else None
        if record and record.lives:
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
            yield replace(settings, port=int(path.stem)), f"pid {record.pid}", f"进程 {record.pid}", since
    for name in (output_of("docker", "ps", "--filter", f"label={LABEL}.port", "--format", "{{.Names}}") or "").split():
        container = DockerContainer(name)
        since = container.inspect("{{.State.StartedAt}}")[:16].replace("T", " ") + " UTC"
        found = replace(settings, port=int(container.label("port")), docker=True, container_name=name)
        yield found, f"container {name}", f"容器 {name}", since


def find_app(settings: LaunchSettings, port_given: bool) -> LaunchSettings:
    """Sets the port or container of the only matching app that runs; without one, returns the settings unchanged.

    Raises `LaunchError`, with a list, if there are several.
    """
    apps = [
        app
        for app in _running_apps(settings)
        if (app[0].docker or not settings.docker) and (not port_given or app[0].port == settings.port)
    ]
    if len(apps) < 2:
        return apps[0][0] if apps else settings
    en, zh = f"{len(apps)} apps run. Name one:", f"有 {len(apps)} 个应用正在运行，请指定其中一个："
    for found, what_en, what_zh, since in apps:
        command = found.command(settings.action)
        en += f"\n   port {found.port}, {what_en}, since {since}: {command}"
        zh += f"\n   端口 {found.port}，{what_zh}，始于 {since}：{command}"
    fail(en, zh)
