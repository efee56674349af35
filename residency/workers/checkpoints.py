"""Checkpoints of worker processes by the NVIDIA driver, through a helper process: no CUDA in this process.

The driver needs a process that keeps it initialised, and its calls may hang: so they run in `checkpoint_helper`. What
follows each outcome is in `devices.checkpoint_transitions`. Not verified on a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import PathFinder
from typing import Any, Literal

import psutil

from ..devices.card_probes import driver_version
from ..devices.checkpoint_transitions import AFTER, FIRST, Call, Operation, Remedy, State, follow
from ..errors import CheckpointFailed, ExtraMissing
from ..memory.self_moving.workers import is_alive
from ..sentences import Sentence
from . import checkpoint_helper
from .checkpoint_helper import Answer, Request

logger = logging.getLogger(__name__)

OLDEST_DRIVER = 570
_FULL, _NOT_PERMITTED = "CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_NOT_PERMITTED"


@dataclass(eq=False)
class _Failure(Exception):
    """A call that did not succeed. ``lost``: without an answer, so the driver may have done it."""

    step: Literal["start"] | Call | Literal["state"]
    words: Sentence
    code: str = ""
    lost: bool = False


class DriverCheckpoints:
    """Checkpoints processes, one at a time. Thread-safe. Implements `residency.contracts.ProcessCheckpoints`.

    ``timeout_s`` of its methods (finite) limits each call of the driver. If ``grace_s`` later there is no answer, the
    helper is ended; the next call starts another one.
    """

    def __init__(self, start_timeout_s: float = 60.0, grace_s: float = 5.0) -> None:
        self._start_timeout_s, self._grace_s = start_timeout_s, grace_s
        self._lock = threading.Lock()
        self._helper: _Helper | None = None
        self._was_ready = self._closed = False
        self._refused: Sentence | None = None
        self._known: dict[int, State] = {}
        """Last known states other than running: for when the driver does not report one."""

    def unavailable(self) -> Sentence | None:
        """Returns why checkpoints are not available, for users; None if nothing is known against them."""
        return self._obstacle or self._refused

    def checkpoint(self, pid: int, timeout_s: float) -> None:
        """Afterwards the process holds nothing on the GPU; raises `CheckpointFailed`."""
        self._run("checkpoint", pid, timeout_s)

    def restore(self, pid: int, timeout_s: float) -> None:
        """Afterwards the process runs as before; raises `CheckpointFailed`."""
        self._run("restore", pid, timeout_s)

    def state(self, pid: int) -> State:
        """Returns the state of a process; ``failed`` also if the driver does not report it after a call was lost."""
        with self._lock:
            found = self._state(pid, self._known.get(pid, "running"), ask=self._was_ready)
            self._remember(pid, found)
            return found

    def close(self) -> None:
        """Ends the helper, also during a call. Processes stay as they are."""
        self._closed = True
        if helper := self._helper:
            helper.end()

    def _run(self, operation: Operation, pid: int, timeout_s: float) -> None:
        def state_after(failure: _Failure) -> State:
            otherwise = "failed" if failure.lost else self._known.get(pid, "running")
            found = self._state(pid, otherwise, ask=failure.step != "start")
            self._remember(pid, found)
            return found

        with self._lock:
            self._remember(pid, FIRST[operation][0])
            failed = follow(operation, lambda call: self._call(call, pid, timeout_s), _Failure, state_after)
        if failed is not None:
            raise _error(pid, *failed) from None

    def _call(self, call: Call, pid: int, timeout_s: float) -> None:
        if not _exists(pid):
            raise _Failure(call, Sentence("the process has ended", "进程已结束"))
        request: Request = {"call": call, "pid": pid}
        if call == "lock":
            request["timeout_ms"] = max(1, int(timeout_s * 1000))  # the driver takes 0 as no limit
        try:
            self._ask(call, request, timeout_s + self._grace_s)
        except _Failure as failure:
            if (call, failure.code) == ("lock", _NOT_PERMITTED):
                self._refused = Sentence(
                    f"The driver permits no checkpoints here ({_NOT_PERMITTED}). Release idle models "
                    f"(--gpu-idle-timeout)",
                    f"驱动在此不允许检查点操作（{_NOT_PERMITTED}）。请释放空闲的模型（--gpu-idle-timeout）",
                )
            raise
        self._refused = None
        self._remember(pid, AFTER[call])

    def _state(self, pid: int, otherwise: State, ask: bool = True) -> State:
        """Asks the driver for the state of a process. ``otherwise``: what to assume without an answer."""
        if ask and _exists(pid):
            with suppress(_Failure):
                otherwise = self._ask("state", {"call": "state", "pid": pid}, self._grace_s)
        return otherwise if _exists(pid) else "gone"

    def _remember(self, pid: int, state: State) -> None:
        if state in ("running", "gone"):
            self._known.pop(pid, None)
        else:
            self._known[pid] = state

    def _ask(self, step: Call | Literal["state"], request: Request, timeout_s: float) -> Any:
        """Makes a call in the helper, which is started if there is none; raises `_Failure`."""
        if self._helper and self._helper.has_ended():  # while it was idle
            self._drop_helper()
        if self._helper is None:
            self._start()
        assert self._helper
        try:
            answer = self._helper.ask(request, timeout_s)
        except BaseException as error:  # Ctrl-C too: the next call would read the answer of this one
            words = self._drop_helper()
            if not isinstance(error, OSError | ValueError):
                raise
            if isinstance(error, TimeoutError):
                words = Sentence(
                    f"the driver has not answered within {timeout_s:g} s", f"驱动在 {timeout_s:g} 秒内没有应答"
                )
            logger.warning(
                "A checkpoint call was lost / 一次检查点调用丢失：%s, pid %s: %s", step, request["pid"], words
            )
            raise _Failure(step, words, lost=True) from None
        if "error" in answer:
            found = re.match(r"CUDA_ERROR_\w+", answer["error"])
            code = found[0] if found else ""
            words = _WORDS.get((step, code)) or Sentence.of(answer["error"].rstrip("."))
            raise _Failure(step, words, code)
        return answer["result"]

    def _start(self) -> None:
        if self._closed:
            raise _Failure("start", Sentence("the manager is closed", "管理器已关闭"))
        try:
            self._helper = _Helper()
            if self._closed:  # meanwhile
                self._helper.end()
            answer = self._helper.ask(None, self._start_timeout_s)
            words = Sentence.of(answer["error"].rstrip(".")) if "error" in answer else None
        except BaseException as error:
            words = self._drop_helper() or Sentence.of(str(error))
            if not isinstance(error, OSError | ValueError):
                raise
            if isinstance(error, TimeoutError):
                limit = f"{self._start_timeout_s:g}"
                words = Sentence(f"it was not ready within {limit} s", f"{limit} 秒内未就绪")
        if words is not None:
            self._drop_helper()
            if not self._was_ready:
                self._refused = Sentence(
                    f"The helper process for checkpoints cannot start ({words.en}). Check the NVIDIA driver and "
                    f"cuda-core",
                    f"检查点辅助进程无法启动（{words.zh}）。请检查 NVIDIA 驱动和 cuda-core",
                )
            raise _Failure("start", words)
        self._was_ready = True

    def _drop_helper(self) -> Sentence:
        """Ends the helper, if there is one, and returns its end in words."""
        helper, self._helper = self._helper, None
        return helper.end() if helper else Sentence.of("")

    @cached_property
    def _obstacle(self) -> Sentence | None:
        """What is missing on this machine."""
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            return Sentence(
                "The driver makes checkpoints only with Linux on x86-64. Release idle models (--gpu-idle-timeout)",
                "驱动仅在 x86-64 的 Linux 上支持检查点。请释放空闲的模型（--gpu-idle-timeout）",
            )
        version = driver_version()
        if version is None:
            return Sentence(
                f"NVML finds no NVIDIA driver. Install driver {OLDEST_DRIVER} or newer",
                f"NVML 找不到 NVIDIA 驱动。请安装 {OLDEST_DRIVER} 或更新的驱动",
            )
        if version[0] < OLDEST_DRIVER:
            shown = ".".join(map(str, version))
            return Sentence(
                f"The NVIDIA driver {shown} makes no checkpoints. Install driver {OLDEST_DRIVER} or newer",
                f"NVIDIA 驱动 {shown} 不支持检查点。请安装 {OLDEST_DRIVER} 或更新的驱动",
            )
        for module in ("cuda.core", "cuda.bindings"):
            if not _is_installed(module):
                missing = ExtraMissing("checkpoint", module)
                return Sentence(missing.en, missing.zh)
        return None


class _Helper:
    """The helper process. Its methods but `end` are called by one thread at a time."""

    def __init__(self) -> None:
        self._socket, far_end = socket.socketpair()
        with far_end:
            paths = [os.path.abspath(path) for path in sys.path]
            self._process = subprocess.Popen(
                [sys.executable, "-m", checkpoint_helper.__name__, str(os.getpid()), str(far_end.fileno())],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, cwd="/", pass_fds=[far_end.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C of the terminal does not reach it
            )  # fmt: skip
        self._unread = b""

    def ask(self, request: Request | None, timeout_s: float) -> Answer:
        """Sends a request, if any, and returns the answer; raises OSError (also TimeoutError) or ValueError."""
        until_s = time.monotonic() + timeout_s
        self._socket.settimeout(timeout_s)
        if request is not None:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        while b"\n" not in self._unread:
            self._socket.settimeout(max(0.001, until_s - time.monotonic()))
            received = self._socket.recv(1 << 16)
            if not received:
                raise ConnectionResetError
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        answer: Answer = json.loads(line)
        return answer

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> Sentence:
        """Ends the process and collects its exit code, which it returns in words. Never raises."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread in `ask`; closing would not
        with suppress(subprocess.TimeoutExpired):  # by itself; or dead already
            self._process.wait(0.1)
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # a process inside the driver may be uninterruptible
            self._process.wait(5)
        self._socket.close()
        code = self._process.returncode
        return Sentence(f"the helper process has ended (exit code {code})", f"辅助进程已退出（退出码 {code}）")


def _error(pid: int, failure: _Failure, remedy: Remedy) -> CheckpointFailed:
    words, then = failure.words, remedy.value
    if remedy is Remedy.RETRY and failure.code == _FULL:
        words = Sentence("CUDA error: out of memory", "显存不足（CUDA error: out of memory）")
    reason = Sentence(f"{words.en}; {then.en}", f"{words.zh}；{then.zh}")
    assert failure.step != "state"
    return CheckpointFailed(pid, failure.step, reason)


def _exists(pid: int) -> bool:
    try:
        return is_alive(psutil.Process(pid))
    except psutil.Error:
        return False


def _is_installed(module: str) -> bool:
    """Returns whether a module below ``cuda`` can be found; imports nothing, unlike `importlib.util.find_spec`."""
    namespace = importlib.util.find_spec("cuda")
    places = namespace.submodule_search_locations if namespace else None
    return places is not None and PathFinder.find_spec(module, places) is not None


_WORDS = {
    ("lock", "CUDA_ERROR_NOT_READY"): Sentence(
        "the GPU was still computing for it when the time was up", "超时后 GPU 仍在为其计算"
    ),
    ("checkpoint", _FULL): Sentence(
        f"main memory has no room for what it holds on the GPU ({_FULL})", f"内存不足以存放其显存内容（{_FULL}）"
    ),
    ("lock", _NOT_PERMITTED): Sentence(
        f"the driver does not permit it ({_NOT_PERMITTED})", f"驱动不允许此操作（{_NOT_PERMITTED}）"
    ),
}
"""The driver's errors for users, by call. Others are shown as they are."""
