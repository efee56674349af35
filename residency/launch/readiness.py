"""Waits until an app, a process or a container, is ready, and reports the result."""

from __future__ import annotations

import http.client
import os
import shlex
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NoReturn

from .options import LaunchSettings
from .records import born
from .terminal import become, fail, say

READINESS_REPORT_EVERY_S = 10


def is_ready(url: str) -> bool:
    """Returns whether /readyz answers 200. Skips verification: the certificate is for another host name."""
    tls = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), tls)
    try:
        with opener.open(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError, http.client.HTTPException):
        return False


def await_ready(
    url: str, timeout_s: float, alive: Callable[[], bool], ours: Callable[[], bool] = lambda: True
) -> Literal["ready", "ended", "late"]:
    """Waits until the app is ready, while it is alive; ``ours`` checks that the answer is from this app."""
    began, reported_s = time.monotonic(), 0
    while not (is_ready(url) and ours()):
        if not alive():
            return "ended"
        waited_s = int(time.monotonic() - began)
        if waited_s >= timeout_s:
            return "late"
        if waited_s >= reported_s + READINESS_REPORT_EVERY_S:
            reported_s = waited_s
            say(f"Still starting, {waited_s} s", f"仍在启动，已 {waited_s} 秒")
        time.sleep(0.1)
    return "ready"


def report_ready(settings: LaunchSettings, url: str, log: str = "") -> None:
    """Prints the URL, the log and the stop command. Without a log, the app runs in this terminal."""
    stop = settings.command("stop")
    say(f"✅ Ready: {url}", f"✅ 已就绪：{url}")
    say(f"   Log: {log or 'this terminal'}", f"   日志：{log or '本终端'}")
    say(f"   Stop: {'' if log else 'Ctrl-C, or '}{stop}", f"   停止：{'' if log else 'Ctrl-C 或 '}{stop}")


def follow_start(
    settings: LaunchSettings, url: str, log: str, last_lines: Sequence[str], alive: Callable[[], bool],
    ours: Callable[[], bool] = lambda: True, falls_back: bool = False,
) -> None:  # fmt: skip
    """Waits until an app in the background is ready; raises `LaunchError` if it has ended or is late.

    ``last_lines`` is the command that prints the end of the log. ``falls_back``: the caller starts the previous app.
    """
    outcome, limit_s = await_ready(url, settings.ready_timeout, alive, ours), settings.ready_timeout
    if outcome == "ready":
        report_ready(settings, url, log)
        return
    stop, ended = settings.command("stop"), outcome == "ended"
    en, zh = f"The app is not ready after {limit_s} s (READY_TIMEOUT)", f"{limit_s} 秒后（READY_TIMEOUT）应用仍未就绪"
    if ended:
        subprocess.run(last_lines, stdout=sys.stderr)
        en, zh = "The app ended during its start; the end of its log is above", "应用在启动时退出；日志末尾见上"
    en, zh = f"{en}. Log: {log}", f"{zh}。日志：{log}"
    if not falls_back and (settings.docker or not ended):
        en += f". {'To restore the previous state' if ended else 'It is still starting. Stop'}: {stop}"
        zh += f"。{'恢复原状' if ended else '启动继续进行。停止'}：{stop}"
    fail(en, zh)


def become_app(
    command: list[str], settings: LaunchSettings, url: str, ours: Callable[[], bool] = lambda: True,
    once_ready: Callable[[], object] = lambda: None, environ: Mapping[str, str] = os.environ,
) -> NoReturn:  # fmt: skip
    """Replaces this process by the app, so that signals and exit code are those of the app.

    A helper process, which is no child of the app, waits for its readiness, calls ``once_ready`` and prints the URL.
    """
    app = os.getpid()
    sys.stdout.flush()
    if child := os.fork():
        os.waitpid(child, 0)
        become(command, environ)
    try:
        if os.fork():
            os._exit(0)
        if await_ready(url, settings.ready_timeout, lambda: bool(born(app)), ours) == "ready":
            once_ready()
            report_ready(settings, url)
    finally:
        os._exit(0)


def report_starting(url: str) -> bool:
    """Prints that an app which runs is not ready; returns False if it is."""
    if is_ready(url):
        return False
    say("The app is not ready: it is starting or stopping", "尚未就绪：应用正在启动或退出")
    return True


def report_plan(settings: LaunchSettings, command: list[str], url: str) -> None:
    """Prints what a start would do, for --check."""
    say(f"Would run: {shlex.join(command)}", f"将执行：{shlex.join(command)}")
    if settings.detach and not settings.docker:
        files = f"{settings.run_dir}/{settings.port}"
        say(f"Would run in the background; log: {files}.log, pid: {files}.pid",
            f"将在后台运行；日志：{files}.log，进程号：{files}.pid")  # fmt: skip
    say(f"Would wait for {url}/readyz, at most {settings.ready_timeout} s",
        f"随后等待 {url}/readyz，最多 {settings.ready_timeout} 秒")  # fmt: skip
    say("Nothing was changed", "未做任何改动")
