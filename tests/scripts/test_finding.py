"""stop, status, logs and restart without a port: the app that runs is meant, and of several none."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from script_project import Project, Service, ready_project, runs


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return ready_project(tmp_path_factory.mktemp("finding"))


@pytest.fixture
def apps(shared: Project, tmp_path: Path) -> Iterator[list[Service]]:
    apps = [Service(shared, tmp_path / "run") for _ in range(2)]
    yield apps
    for app in apps:
        with suppress(OSError, ValueError):
            os.kill(app.pid, signal.SIGKILL)


def test_the_one_that_runs_is_found(apps: list[Service]) -> None:
    app, gone = apps
    gone.start("--gone")
    os.kill(gone.pid, signal.SIGKILL)
    first = app.start("--one")["pid"]
    assert f"pid {first}, http://127.0.0.1:{app.port}" in app.localize("status", PORT="")
    assert "--one" in app.localize("logs", PORT="")
    assert "Ready" in app.localize("restart", PORT="")
    again = app.pid
    assert not runs(first)
    assert app.seen()["argv"][2:4] == ["--serve", "--one"]
    assert f"Stopping pid {again}" in app.localize("stop", PORT="")
    assert not runs(again)
    assert app.call("status", PORT="")[0] == 3


@pytest.mark.parametrize("action", ["status", "logs", "stop", "restart"])
def test_several_are_listed_with_the_way_to_name_one(apps: list[Service], action: str) -> None:
    for app in apps:
        app.start()
    code, said = apps[0].call(action, PORT="")
    assert (code, "2 apps are running. Choose one:" in said) == (1, True), said
    for app in apps:
        line = next(line for line in said.splitlines() if f"port {app.port}, pid {app.pid}, since 20" in line)
        assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d: ", line)
        assert runs(app.pid)
    assert subprocess.run(shlex.split(line.partition(": ")[2]), capture_output=True, check=False).returncode == 0
    assert f"pid {apps[0].pid}" in apps[0].localize("status"), "the other one is not touched"


def test_what_is_said_after_a_start_means_that_app_also_beside_another_one(apps: list[Service]) -> None:
    said = [app.localize("--detach", "--serve") for app in apps]
    line = next(line for line in said[0].splitlines() if "Stop:" in line).partition("Stop: ")[2]
    pids = [app.pid for app in apps]
    assert subprocess.run(shlex.split(line), capture_output=True, check=False).returncode == 0
    assert [runs(pid) for pid in pids] == [False, True]
