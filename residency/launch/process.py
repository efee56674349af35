"""Runs the app as a process: start; from another terminal: stop, status, logs, restart."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from ..errors import ResidencyError
from . import command_line
from .checks import check_disk, check_run_dir, check_writable
from .choose_gpu import Gpu, check_driver, choose_gpu, torch_of_environment, torch_of_pins
from .environment import environment_state, plan_environment, prepare_environment, python_of
from .listening import check_port, holders_of_port, reach_directly
from .options import PUBLIC, LaunchSettings, read
from .readiness import await_ready, become_app, follow_start, report_plan, report_ready, report_starting
from .records import Record, RecordFile, born, locked
from .terminal import become, fail, report, say, warn


class Process:
    """Actions for one port; they return the exit code."""

    def __init__(self, settings: LaunchSettings) -> None:
        self.settings, self.url = settings, settings.url()
        self.file = RecordFile(settings.run_dir, settings.port)
        self.environment = Path(settings.venv_dir), [Path(settings.project_dir, "requirements.txt")]

    # -- start ----------------------------------------------------------------------------------------------------

    def start(self) -> int:
        self._refuse_second_start()
        gpu = self._prepare(self.settings.port)  # checks the port before an install of minutes; `_launch` checks again
        if self.settings.check:
            report_plan(self.settings, self._command(), self.url)
            return 0
        return self._launch(gpu)

    def _command(self) -> list[str]:
        settings = self.settings
        return [python_of(Path(settings.venv_dir)), f"{settings.project_dir}/app.py", *settings.app_arguments()]

    def _refuse_second_start(self) -> None:
        port, record = self.settings.port, self.file.read()
        if record and record.runs:
            fail(f"An app already runs on port {port} (pid {record.pid}). Use restart, stop or another --port",
                 f"端口 {port} 上的应用已在运行（进程 {record.pid}）。请用 restart、stop，或换一个 --port")  # fmt: skip

    def _check_port(self, port: int) -> None:
        check_port(self.settings.host, port, self.settings.named("HOST"), ("--host", "--port"))

    def _prepare(self, port: int) -> Gpu:
        """Checks all conditions of a start, and makes the environment. Port 0: host only."""
        settings = self.settings
        self._check_port(port)
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
                f"There is no Python environment {venv}, and this script creates none in a checkout: create it as "
                f"Step-Audio-EditX describes, or leave VENV_DIR out",
                f"没有 Python 环境 {venv}，且本脚本不会在代码目录中新建：请按 Step-Audio-EditX 的说明创建，"
                f"或不设置 VENV_DIR",
            )
        check_writable(venv, self.settings.named("VENV_DIR"))
        check_disk(venv, "The environment", "Python 环境")

    def _launch(self, gpu: Gpu, restarts: bool = False) -> int:
        """Starts the app. ``restarts``: raises `LaunchError` if it is not ready, for the previous app to be started."""
        settings, command, environ = self.settings, self._command(), os.environ | gpu.variables
        process, log = None, f"{settings.run_dir}/{settings.port}.log" if settings.detach else ""
        with locked(settings.run_dir):
            self._refuse_second_start()
            self._check_port(settings.port)
            say(f"Starting {self.url}", f"正在启动 {self.url}")
            if log:
                process = _spawn_with_log(command, environ, Path(log))
            elif restarts:
                process = subprocess.Popen(command, env=environ)
            pid = process.pid if process else os.getpid()
            remembered = settings.remembered()
            self.file.write(Record(pid, born(pid), log, os.getcwd(), list(settings.arguments), remembered), settings)
        if process is None:
            become_app(command, settings, self.url, lambda: self._listens(pid), environ=environ)
        return self._follow(process, log, restarts) if log else self._attend(process)

    def _listens(self, pid: int) -> bool:
        """Returns whether this process, not another one, listens on the port; true if unknown."""
        holders = holders_of_port(self.settings.port)
        return bool(born(pid)) and (not holders or pid in holders)

    def _follow(self, process: subprocess.Popen[bytes], log: str, restarts: bool) -> int:
        """Waits until the app in the background is ready; raises `LaunchError` otherwise."""
        try:
            follow_start(
                self.settings, self.url, log, ["tail", "-n", "20", log], lambda: process.poll() is None,
                lambda: self._listens(process.pid), restarts,
            )  # fmt: skip
        except KeyboardInterrupt:
            stop = self.settings.command("stop")
            say(f"The app is still starting. Stop: {stop}", f"启动继续进行。停止：{stop}")
            return 130
        return 0

    def _attend(self, process: subprocess.Popen[bytes]) -> int:
        """Forwards signals to the app in this terminal; returns its exit code. Raises `LaunchError` if it fails."""
        signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
        signal.signal(signal.SIGINT, lambda number, frame: None)  # the app receives it, too
        limit_s, pid = self.settings.ready_timeout, process.pid
        ready = await_ready(self.url, limit_s, lambda: process.poll() is None, lambda: self._listens(pid)) == "ready"
        if ready:
            report_ready(self.settings, self.url)
        code = process.wait()
        if not ready and code not in (0, -signal.SIGINT, -signal.SIGTERM):
            fail(f"The app ended during its start (exit code {code})", f"应用在启动时退出（退出码 {code}）")
        return code if code >= 0 else 128 - code

    # -- restart --------------------------------------------------------------------------------------------------

    def restart(self) -> int:
        """Restarts; starts the previous app again if the new one does not become ready."""
        before = self.file.read()
        if before is None or not before.runs:
            self._report_nothing()
            return self.start()
        self._prepare(0)  # before the running app, which holds the port, is ended
        self._end(before)
        try:
            # Chooses the GPU again, by the memory that is free now.
            return self._launch(choose_gpu(self.settings), restarts=True)
        except ResidencyError as error:
            report(error)
        self._start_previous(before)

    def _start_previous(self, before: Record) -> NoReturn:
        """Starts the previous app with the settings of its record only; ends with an error."""
        warn("❌ The restart has failed (see above). The previous app is started again with its settings",
             "❌ 重启失败（见上）。正在按原来的设置重新启动之前运行的应用")  # fmt: skip
        settings, record = self.settings, self.file.read()
        # The new app may be late.
        if record and not _wait_for_end(record, signal.SIGTERM, settings.stop_timeout):
            _wait_for_end(record, signal.SIGKILL, 5)
        self.file.write(before, settings)
        for name in PUBLIC:
            os.environ.pop(name, None)
        os.environ.update((name, text) for name, text in before.settings.items() if name in PUBLIC)
        previous = read(["restart"], settings.script, {}, before.settings, before.arguments)
        kept = {name: getattr(settings, name) for name in ("port", "run_dir", "ready_timeout", "stop_timeout")}
        process = Process(replace(previous, **kept))
        try:
            process._launch(process._prepare(settings.port), restarts=True)
        except ResidencyError as error:
            report(error)
            port, again = settings.port, settings.command("restart")
            fail(f"The previous app did not start (see above): nothing runs on port {port} now. Try again: {again}",
                 f"之前的应用也无法启动（见上）：端口 {port} 上目前没有服务。排除原因后请执行：{again}")  # fmt: skip
        fail("The restart has failed; the previous app was started with its previous settings",
             "重启失败，原因见上；已按原设置启动之前的应用")  # fmt: skip

    # -- other actions --------------------------------------------------------------------------------------------

    def _end(self, record: Record | None) -> None:
        """Ends the app of a record; a running request may finish. Raises `LaunchError` after STOP_TIMEOUT."""
        if record is None or not record.runs:
            self._report_nothing()
            return
        pid, limit_s, port = record.pid, self.settings.stop_timeout, self.settings.port
        say(f"Stopping pid {pid}; a running request may finish. A second stop ends it at once",
            f"正在停止进程 {pid}；正在运行的请求可以完成。再次执行 stop 则立即停止")  # fmt: skip
        if not _wait_for_end(record, signal.SIGTERM, limit_s):
            en = f"Pid {pid} still runs after {limit_s} s (STOP_TIMEOUT)"
            zh = f"{limit_s} 秒后（STOP_TIMEOUT）进程 {pid} 仍在运行"
            if self.settings.action == "restart":
                en += f", so no new app was started. After its end, nothing runs on port {port}: "
                en += self.settings.command("restart")
                zh += f"，因此未启动新的应用。它退出后端口 {port} 上将没有服务：{self.settings.command('restart')}"
            else:
                en, zh = f"{en}. A second stop ends it at once", f"{zh}。再次执行 stop 可立即结束"
            fail(f"{en}. If it hangs: kill -9 {pid}", f"{zh}。如已卡死：kill -9 {pid}")
        say("Stopped", "已停止")

    def _report_nothing(self) -> None:
        self.file.pid_path.unlink(missing_ok=True)
        port = self.settings.port
        say(f"No app of this script runs on port {port}", f"端口 {port} 上没有由本脚本启动的应用")

    def stop(self) -> int:
        self._end(self.file.read())
        self.file.delete()
        return 0

    def status(self) -> int:
        """Returns 3 if the app does not run."""
        record = self.file.read()
        if record is None or not record.runs:
            self._report_nothing()
            return 3
        say(f"Running: pid {record.pid}, {self.url}", f"正在运行：进程 {record.pid}，{self.url}")
        say(f"Log: {record.log or 'its terminal'}", f"日志：{record.log or '启动它的终端'}")
        if report_starting(self.url):
            return 0
        reach_directly(self.settings.host)
        return command_line.main(["status", "--url", self.url])

    def logs(self) -> int:
        port, record = self.settings.port, self.file.read()
        file = Path(self.settings.run_dir, f"{port}.log")
        if (record and record.runs and not record.log) or not file.exists():
            fail(f"There is no log of port {port}: without --detach, the app writes to the terminal of its start",
                 f"没有端口 {port} 的日志：未用 --detach 启动时，应用输出到启动它的终端")  # fmt: skip
        become(["tail", "-n", "100", *(["-F"] if self.settings.follow else []), str(file)])


def _spawn_with_log(command: list[str], environ: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Starts the app in the background; keeps the previous log as LOG.1."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.is_file() and log.stat().st_size:
            log.replace(f"{log}.1")
        log.unlink(missing_ok=True)
        output = open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600), "wb")  # noqa: SIM115
    except OSError as error:
        fail(f"The log {log} cannot be created ({error.strerror}): remove it, or give another folder with --run-dir",
             f"无法新建日志 {log}（{error.strerror}）：请删除它，或用 --run-dir 换一个目录")  # fmt: skip
    with output:
        return subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_for_end(record: Record, number: signal.Signals, limit_s: float) -> bool:
    """Sends a signal and waits; returns whether the app has ended."""
    if record.runs:
        with suppress(ProcessLookupError):
            os.kill(record.pid, number)
    until = time.monotonic() + limit_s
    while runs := record.runs:
        if time.monotonic() >= until:
            break
        time.sleep(0.1)
    return not runs
