"""Restart of the app as a process; if it fails, the previous app is started again."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from ..errors import ResidencyError
from .choose_gpu import choose_gpu
from .options import PUBLIC, SETTINGS
from .records import Record
from .service import Service, wait_for_end
from .terminal import become, fail, report, warn


def restart(service: Service) -> int:
    """Restarts; keeps the record of the last start until the new app is ready."""
    before = service.file.read()
    if before is None or not before.lives:
        service.report_nothing()
        return service.start()
    service.prepare(0)  # before the running app, which holds the port, is ended
    service.end(before)
    # Chooses the GPU again, by the memory that is free now.
    code = _follow(lambda: service.launch(choose_gpu(service.settings), again=True))
    if code in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM) or not _came_to_nothing(service, before):
        return code
    _bring_back(service)


def _follow(work: Callable[[], int]) -> int:
    """Runs ``work`` in a child process, which may become the app; forwards signals. Returns the exit code."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 1
        try:
            code = work()
        except KeyboardInterrupt:
            code = 130
        except ResidencyError as error:
            report(error)
        finally:
            os._exit(code)
    handlers = [
        (signal.SIGTERM, signal.signal(signal.SIGTERM, lambda number, frame: os.kill(child, number))),
        (signal.SIGINT, signal.signal(signal.SIGINT, lambda number, frame: None)),  # the child receives it, too
    ]
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for number, handler in handlers:
        signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _came_to_nothing(service: Service, before: Record) -> bool:
    """Returns whether the new app was never ready: then the previous record still exists, or is restored."""
    record = service.file.read()
    return service.file.last.exists() or (record is not None and record.pid == before.pid)


def _bring_back(service: Service) -> NoReturn:
    """Starts the previous app again if possible; ends with an error."""
    warn("❌ The restart has failed (see above). The app from before is started again, with its settings",
         "❌ 重启失败（见上）。正在按原来的设置重新启动之前运行的应用")  # fmt: skip
    if service.file.last.exists():
        # The new app was not ready in time.
        record = service.file.read()
        if record and record.lives and not wait_for_end(record, signal.SIGTERM, service.settings.stop_timeout):
            wait_for_end(record, signal.SIGKILL, 5)
        service.file.revert()
    port, again = service.settings.port, service.settings.command("restart")
    if _follow(lambda: _start_as_before(service)):
        fail(f"It does not start either (see above): nothing serves on port {port} now. After a repair: {again}",
             f"之前的应用也无法启动（见上）：端口 {port} 上目前没有服务。排除原因后请执行：{again}")  # fmt: skip
    fail("The restart has failed. The app is the one from before, with the settings that it had",
         "重启失败，原因见上。应用为之前的那一个，设置不变")  # fmt: skip


def _start_as_before(service: Service) -> NoReturn:
    """Uses only the record, not the settings given for the restart."""
    settings = service.settings
    for name in (*SETTINGS, *PUBLIC):
        os.environ.pop(name, None)
        os.environ.pop(f"GPU_TTS_{name}", None)
    words = [settings.script, "restart", "--port", str(settings.port), "--run-dir", settings.run_dir]
    words += ["--ready-timeout", str(settings.ready_timeout), "--stop-timeout", str(settings.stop_timeout)]
    become(words)
