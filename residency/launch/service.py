"""Runs the app as a process: start; from another terminal: stop, status, logs, restart."""

from __future__ import annotations

import http.client
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, NoReturn

from ..addresses import bracketed
from . import command_line
from .checks import app_arguments, check_disk, check_port, check_run_dir, check_writable, holders_of_port, value_of
from .choose_gpu import Gpu, check_driver, choose_gpu, torch_of_environment, torch_of_pins
from .environment import environment_state, plan_environment, prepare_environment, python_of
from .options import PUBLIC, REMEMBERED, SETTINGS, LaunchSettings
from .proxies import reach_directly
from .records import Record, RecordFile, born, locked
from .terminal import become, fail, quoted, say

TELL_EVERY_S = 10


def reached_at(host: str) -> str:
    """Returns an address that reaches ``host`` from this machine."""
    host = host.removeprefix("[").removesuffix("]")
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def address(settings: LaunchSettings, tls: bool = False) -> str:
    """Returns the app's URL; ``tls`` forces https, which is otherwise derived from the arguments."""
    scheme = "https" if tls or value_of("--ssl-certfile", settings) else "http"
    return f"{scheme}://{bracketed(reached_at(settings.host))}:{settings.port}"


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
    url: str, timeout_s: float, every_s: float, alive: Callable[[], bool], ours: Callable[[], bool] = lambda: True
) -> Literal["ready", "ended", "late"]:
    """Waits until the app is ready, while it is alive; ``ours`` checks that the answer is from this app."""
    began, told_s = time.monotonic(), 0
    while not (is_ready(url) and ours()):
        if not alive():
            return "ended"
        waited_s = int(time.monotonic() - began)
        if waited_s >= timeout_s:
            return "late"
        if waited_s >= told_s + TELL_EVERY_S:
            told_s = waited_s
            say(f"Still starting, {told_s} s", f"仍在启动，已 {told_s} 秒")
        time.sleep(every_s)
    return "ready"


def report_ready(url: str, log: tuple[str, str], stop: tuple[str, str]) -> None:
    """Prints the URL, the log and the stop command; texts in English and Chinese."""
    say(f"✅ Ready: {url}", f"✅ 已就绪：{url}")
    say(f"   Log: {log[0]}", f"   日志：{log[1]}")
    say(f"   Stop: {stop[0]}", f"   停止：{stop[1]}")


def become_app(
    command: list[str], settings: LaunchSettings, url: str,
    ours: Callable[[], bool] = lambda: True, confirm: Callable[[], None] = lambda: None,
) -> NoReturn:  # fmt: skip
    """Replaces this process by the app, so that signals and exit code are those of the app.

    A helper process, which is no child of the app, waits until the app is ready, calls ``confirm`` and prints the URL.
    """
    app = os.getpid()
    sys.stdout.flush()
    if child := os.fork():
        os.waitpid(child, 0)
        become(command)
    try:
        if os.fork():
            os._exit(0)
        if await_ready(url, settings.ready_timeout, 0.1, lambda: bool(born(app)), ours) == "ready":
            confirm()
            stop = settings.command("stop")
            report_ready(url, ("this terminal", "本终端"), (f"Ctrl-C, or {stop}", f"Ctrl-C 或 {stop}"))
    finally:
        os._exit(0)


def report_plan(settings: LaunchSettings, command: list[str], url: str) -> None:
    say(f"Would run: {quoted(command)}", f"将执行：{quoted(command)}")
    if settings.detach and not settings.docker:
        paths = f"{settings.run_dir}/{settings.port}.log", f"{settings.run_dir}/{settings.port}.pid"
        say(f"Would run in the background; log: {paths[0]}, pid: {paths[1]}",
            f"将在后台运行；日志：{paths[0]}，进程号：{paths[1]}")  # fmt: skip
    say(f"Would wait for {url}/readyz, at most {settings.ready_timeout} s",
        f"随后等待 {url}/readyz，最多 {settings.ready_timeout} 秒")  # fmt: skip
    say("Nothing was changed", "未做任何改动")


class Service:
    """Actions for one port; they return the exit code."""

    def __init__(self, settings: LaunchSettings) -> None:
        self.settings = settings
        self.file = RecordFile(settings.run_dir, settings.port)
        self.url = address(settings)
        self.environment = Path(settings.venv_dir), [Path(settings.project_dir, "requirements.txt")]
        # Values before automatic choices.
        texts = {name: str(getattr(settings, each.name)) for name, each in SETTINGS.items()}
        texts |= {"DETACH": str(int(settings.detach))}
        self.remembered = {name: text for name, text in texts.items() if name in REMEMBERED}
        self.remembered |= {name: os.environ[name] for name in PUBLIC if name in os.environ}

    # -- start ----------------------------------------------------------------------------------------------------

    def start(self) -> int:
        self._refuse_second_start()
        gpu = self.prepare(self.settings.port)  # checks the port before an install of minutes; `launch` checks again
        if self.settings.check:
            report_plan(self.settings, self._app(), self.url)
            return 0
        return self.launch(gpu)

    def _app(self) -> list[str]:
        settings = self.settings
        return [python_of(Path(settings.venv_dir)), f"{settings.project_dir}/app.py", *app_arguments(settings)]

    def _refuse_second_start(self) -> None:
        port, record = self.settings.port, self.file.read()
        if record and record.lives:
            fail(
                f"It runs already on port {port} (pid {record.pid}): {self.url}. Use restart or stop, or another "
                f"--port",
                f"端口 {port} 上已在运行（进程 {record.pid}）：{self.url}。请用 restart 或 stop，或换一个 --port",
            )

    def prepare(self, port: int) -> Gpu:
        """Checks all conditions of a start, and makes the environment. Port 0: host only."""
        settings = self.settings
        check_port(settings, port)
        gpu = choose_gpu(settings)
        state = environment_state(*self.environment)
        if state in ("absent", "broken"):
            self._check_place_of_environment()
        if state in ("absent", "broken", "outdated") and not torch_of_environment(settings):
            check_driver(gpu, torch_of_pins(settings), settings.venv_dir)
        if settings.detach:
            check_run_dir(settings)
        (plan_environment if settings.check else prepare_environment)(*self.environment)
        check_driver(gpu, torch_of_environment(settings), settings.venv_dir)
        return gpu

    def _check_place_of_environment(self) -> None:
        venv, checkout = self.settings.venv_dir, self.settings.step_audio_root
        if checkout and venv.startswith(f"{checkout}/"):
            fail(
                f"There is no Python environment {venv}, and nothing is made in a checkout: make it as "
                f"Step-Audio-EditX says, or leave VENV_DIR out",
                f"没有 Python 环境 {venv}，且不会在代码目录中新建：请按 Step-Audio-EditX 的说明创建，或不设置 VENV_DIR",
            )
        check_writable(venv, self.settings.named("VENV_DIR"))
        check_disk(venv, "The environment", "Python 环境")

    def launch(self, gpu: Gpu, again: bool = False) -> int:
        """Starts the app. ``again``: for a restart, whose caller ends an app that is not ready in time."""
        command, started_in = self._app(), os.getcwd()
        os.environ.update(gpu.variables)
        with locked(self.settings.run_dir):
            self._refuse_second_start()
            check_port(self.settings, self.settings.port)
            say(f"Starting {self.url}", f"正在启动 {self.url}")
            if self.settings.detach:
                process, log = self._spawn(command)
                pid = process.pid
            else:
                process, log, pid = None, "", os.getpid()
            record = Record(pid, born(pid), log, started_in, self.settings.arguments, self.remembered)
            self.file.write(record, self.settings)
        if process is not None:
            return self._follow_start(process, log, again)
        become_app(command, self.settings, self.url, lambda: self._listens(pid), self.file.confirm)

    def _listens(self, pid: int) -> bool:
        """Returns whether this process, not another one, listens on the port; true if unknown."""
        holders = holders_of_port(self.settings.port)
        return bool(born(pid)) and (not holders or pid in holders)

    def _spawn(self, command: list[str]) -> tuple[subprocess.Popen[bytes], str]:
        log = Path(self.settings.run_dir, f"{self.settings.port}.log")
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            if log.is_file() and log.stat().st_size:
                log.replace(f"{log}.1")
            log.unlink(missing_ok=True)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        except OSError as error:
            fail(f"The log {log} cannot be made ({error.strerror}): remove it, or give another folder with --run-dir",
                 f"无法新建日志 {log}（{error.strerror}）：请删除它，或用 --run-dir 换一个目录")  # fmt: skip
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        finally:
            os.close(output)
        return process, str(log)

    def _follow_start(self, process: subprocess.Popen[bytes], log: str, again: bool) -> int:
        timeout_s, stop = self.settings.ready_timeout, self.settings.command("stop")
        try:
            pid = process.pid
            outcome = await_ready(self.url, timeout_s, 0.05, lambda: bool(born(pid)), lambda: self._listens(pid))
        except KeyboardInterrupt:
            say(f"It goes on starting. Stop: {stop}", f"启动继续进行。停止：{stop}")
            return 130
        if outcome == "ready":
            self.file.confirm()
            said = f"{log} (pid {process.pid})"
            report_ready(self.url, (said, said), (stop, stop))
            return 0
        if outcome == "ended":
            self.file.revert()
            subprocess.run(["tail", "-n", "20", log], stdout=sys.stderr)
            fail(f"The app ended while it started; the end of its log is above ({log})",
                 f"应用在启动时退出；日志末尾见上（{log}）")  # fmt: skip
        en, zh = f"It is not ready after {timeout_s} s (READY_TIMEOUT)", f"{timeout_s} 秒后（READY_TIMEOUT）仍未就绪"
        if again:
            fail(f"{en}. Log: {log}", f"{zh}。日志：{log}")
        fail(f"{en}, and goes on starting. Log: {log}. Stop: {stop}", f"{zh}，启动继续进行。日志：{log}。停止：{stop}")

    # -- other actions --------------------------------------------------------------------------------------------

    def end(self, record: Record | None) -> None:
        """Ends the app of a record; a running request may finish. Raises `LaunchError` after STOP_TIMEOUT."""
        if record is None or not record.lives:
            self.report_nothing()
            return
        pid, limit_s, port = record.pid, self.settings.stop_timeout, self.settings.port
        say(f"Stopping pid {pid}; a running request may finish. Once more: at once",
            f"正在停止进程 {pid}；正在运行的请求可以完成。再次执行则立即停止")  # fmt: skip
        if not wait_for_end(record, signal.SIGTERM, limit_s):
            en = f"Pid {pid} still runs after {limit_s} s (STOP_TIMEOUT)"
            zh = f"{limit_s} 秒后（STOP_TIMEOUT）进程 {pid} 仍在运行"
            if self.settings.action == "restart":
                again = self.settings.command("restart")
                fail(
                    f"{en}, so nothing else was started. Once it has ended, nothing serves on port {port}: {again}. "
                    f"If it hangs: kill -9 {pid}",
                    f"{zh}，因此未启动新的应用。它退出后端口 {port} 上将没有服务：{again}。如已卡死：kill -9 {pid}",
                )
            fail(f"{en}. Stop it once more to end it at once; if it hangs: kill -9 {pid}",
                 f"{zh}。再次执行 stop 可立即结束；如已卡死：kill -9 {pid}")  # fmt: skip
        say("Stopped", "已停止")

    def report_nothing(self) -> None:
        self.file.pid_path.unlink(missing_ok=True)
        port = self.settings.port
        say(f"Nothing that this script started runs on port {port}", f"端口 {port} 上没有由本脚本启动的应用")

    def stop(self) -> int:
        self.end(self.file.read())
        self.file.forget()
        return 0

    def status(self) -> int:
        """Returns 3 if the app does not run."""
        record = self.file.read()
        if record is None or not record.lives:
            self.report_nothing()
            return 3
        say(f"Runs: pid {record.pid}, {self.url}", f"正在运行：进程 {record.pid}，{self.url}")
        say(f"Log: {record.log or 'its terminal'}", f"日志：{record.log or '其终端'}")
        if not is_ready(self.url):
            say("Not ready yet, or on its way out", "尚未就绪，或正在退出")
            return 0
        reach_directly(reached_at(self.settings.host))
        return command_line.main(["status", "--url", self.url])

    def logs(self) -> int:
        file, record = Path(self.settings.run_dir, f"{self.settings.port}.log"), self.file.read()
        if record and record.lives and not record.log:
            fail(f"It writes to the terminal in which it was started (pid {record.pid}); with --detach there is a log",
                 f"它输出到启动时的终端（进程 {record.pid}）；用 --detach 启动才有日志")  # fmt: skip
        if not file.exists():
            port = self.settings.port
            fail(f"There is no log of port {port}: the app writes to its terminal unless it was started with --detach",
                 f"没有端口 {port} 的日志：未用 --detach 启动时，应用输出到其终端")  # fmt: skip
        become(["tail", "-n", "100", *(["-F"] if self.settings.follow else []), str(file)])


def wait_for_end(record: Record, number: signal.Signals, limit_s: float) -> bool:
    """Sends a signal and waits; returns whether the app has ended."""
    with suppress(ProcessLookupError):
        os.kill(record.pid, number)
    until = time.monotonic() + limit_s
    while lives := record.lives:
        if time.monotonic() >= until:
            break
        time.sleep(0.1)
    return not lives
