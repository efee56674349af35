"""The manager's side of one worker process: calls, progress, cancellation, and its end."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import queue
import signal
import socket
import sys
import threading
import time
from typing import Any

from .. import cancellation, progress
from ..engines.part_proxy import Part, Path
from ..errors import RequestStopped, WorkerDied
from ..locks import renewed_in_children
from ..random_state import RandomState
from ..sentences import Sentence
from .calls import Answer, Ask, Move, Setup, Sizes
from .messages import Channel, Frame, Kind, _Unpickler
from .remote_errors import rebuilt
from .spawner import Spawner

logger = logging.getLogger(__name__)

STOPS_WITHIN_S = 10.0
"""Time for the engine to stop a cancelled call; then the worker is ended."""

PING_EVERY_S = 5.0
"""Interval of the checks whether a worker that has a call still reacts."""

HANGS_AFTER_S = 120.0
"""Time without a reaction, or without progress of a move off the device, after which a worker is ended."""

_REPORTED_WITHIN_S = 2.0

_CANCELLED = object()
_Received = Frame | object | None


class WorkerProcess:
    """One worker. Any thread may call it; the calls run at the same time."""

    def __init__(self, name: str, spawner: Spawner, hangs_after_s: float = HANGS_AFTER_S) -> None:
        """Forks the worker and prepares its process state. ``name``: that of the model, for messages."""
        self.name = name
        self.sizes = Sizes()
        self.checkpointed = False
        self._hangs_after_s = hangs_after_s
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[_Received]] = {}
        self._random: RandomState | None = None
        self._status: int | None = None
        self._has_ended = threading.Event()
        self._reason: Sentence | None = None
        self._heard_s = time.monotonic()
        self._pidfd_lock = renewed_in_children(threading.Lock())
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        try:
            with theirs:
                self.pid, self._pidfd = spawner.spawn(theirs, self._on_end)
        except BaseException:
            self._channel.close()
            raise
        threading.Thread(target=self._receive, name=f"gpu-worker-{name}", daemon=True).start()
        log_level = logging.getLogger().getEffectiveLevel()
        self.ask(Setup(dict(os.environ), os.getcwd(), list(sys.path), list(sys.argv), log_level))

    @property
    def ended(self) -> bool:
        """Whether the process has ended, or is being ended."""
        return self._reason is not None or self._has_ended.is_set()

    @property
    def modules(self) -> int:
        return self.sizes.modules

    def ask(self, ask: Ask, keeper: Any = None) -> Any:
        """Sends a call and waits for its answer. Parts in it are those of ``keeper``.

        Raises the worker's error; `WorkerDied` if the process ends; `RequestStopped` if the request in this context
        was cancelled and the engine did not stop.
        """
        if ask.draws:
            here = RandomState(cuda=False)
            if here.differs_from(self._random):
                ask.random = self._random = here
        number, frames = next(self._numbers), queue.SimpleQueue[_Received]()
        self._waiting[number] = frames
        try:
            if self.ended:
                raise self.died()
            try:
                self._channel.send(Kind.CALL, number, ask, _save_part)
            except OSError:
                raise self.died() from None
            if ask.draws and (current := cancellation.current()) is not None:  # moves go on
                current.on_cancel(lambda: frames.put(_CANCELLED))
            try:
                answer = self._wait(number, frames, isinstance(ask, Move))
            except (KeyboardInterrupt, SystemExit):
                self._stop_call(number, frames)
                raise
        finally:
            del self._waiting[number]
        return self._value(answer, keeper)

    def forget(self, token: int) -> None:
        """Drops an object of the worker that only a part of the manager's process has kept."""
        with contextlib.suppress(OSError):
            self._channel.send(Kind.FORGET, token)

    def kill(self, reason: Sentence) -> None:
        """Ends the process at once, also while it is stopped or hangs. ``reason``: for `WorkerDied`."""
        self._reason = self._reason or reason
        self._kill()

    def _kill(self) -> None:
        with self._pidfd_lock, contextlib.suppress(OSError):
            if not self._has_ended.is_set():
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def finish(self, within_s: float) -> None:
        """Closes the connection, so that the process ends; kills it if it has not ended in time. Waits for its end."""
        self._reason = self._reason or Sentence("it was released", "它已被释放")
        self._channel.close()
        if not self._has_ended.wait(within_s):
            self._kill()
            self._has_ended.wait(within_s)

    def died(self) -> WorkerDied:
        """Returns the error about the end of the process."""
        if self._reason is None:
            self._has_ended.wait(_REPORTED_WITHIN_S)
        return WorkerDied(self.name, self._reason or _cause(self._status))

    # -- waiting --------------------------------------------------------------------------------------------------

    def _wait(self, number: int, frames: queue.SimpleQueue[_Received], moves: bool) -> Frame:
        stop_at_s, shown, advanced_s = math.inf, ("", 0), time.monotonic()
        while True:
            try:
                frame = frames.get(timeout=max(0.0, min(PING_EVERY_S, stop_at_s - time.monotonic())))
            except queue.Empty:
                if time.monotonic() >= stop_at_s:
                    self.kill(Sentence("it did not stop after a cancellation", "取消后它没有停止"))
                    raise RequestStopped from None
                self._check_reaction(advanced_s if moves else math.inf)
                continue
            if frame is None:
                if stop_at_s < math.inf:
                    raise RequestStopped
                raise self.died()
            if frame is _CANCELLED:
                with contextlib.suppress(OSError):
                    self._channel.send(Kind.CANCEL, number)
                stop_at_s = time.monotonic() + STOPS_WITHIN_S
                continue
            assert isinstance(frame, Frame)
            if frame.kind is not Kind.PROGRESS:
                return frame
            shown, advanced_s = _show(frame.unpickled(_no_part), shown), time.monotonic()

    def _check_reaction(self, advanced_s: float) -> None:
        """Ends a worker that is silent, or whose move has not advanced since ``advanced_s``, for too long."""
        silent_s = time.monotonic() - min(self._heard_s, advanced_s)
        if silent_s > self._hangs_after_s:
            self.kill(Sentence(f"it did not react for {silent_s:.0f} s", f"它在 {silent_s:.0f} 秒内没有响应"))
            return
        with contextlib.suppress(OSError):
            self._channel.send(Kind.PING, 0)

    def _stop_call(self, number: int, frames: queue.SimpleQueue[_Received]) -> None:
        """After Ctrl-C: waits until the call has ended, or ends the worker; a lease must not end before its call."""
        with contextlib.suppress(OSError):
            self._channel.send(Kind.CANCEL, number)
        until_s = time.monotonic() + STOPS_WITHIN_S
        try:
            while (frame := frames.get(timeout=max(0.0, until_s - time.monotonic()))) is not None:
                if isinstance(frame, Frame) and frame.kind is not Kind.PROGRESS:
                    return
        except BaseException:  # too long, or a second Ctrl-C
            self.kill(Sentence("it did not stop after an interrupt", "中断后它没有停止"))

    def _value(self, frame: Frame, keeper: Any) -> Any:
        def load_part(path: Path) -> Part:
            return Part(keeper, path)

        content = frame.unpickled(load_part, installed_only=True)
        if isinstance(content, Answer):
            self.sizes = content.sizes
            if content.random is not None:
                content.random.continue_here(self._random, cuda=False)
                self._random = content.random
            return content.value
        record, self.sizes, lost = content
        error = rebuilt(record, lambda data: _Unpickler(data, (), load_part, installed_only=True).load())
        if lost:
            logger.error("%s: its worker process cannot use the device any more", self.name, exc_info=error)
            words = str(error).partition("\n")[0]
            self.kill(Sentence(f"the device failed for it ({words})", f"设备对它失效（{words}）"))
            raise self.died()
        try:
            raise error
        finally:
            del error  # a cycle: its traceback has this frame

    # -- other threads --------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        with contextlib.suppress(EOFError):
            while True:
                frame = self._channel.receive()
                self._heard_s = time.monotonic()
                if frame.kind is Kind.LOG:
                    _log(frame)
                elif frames := self._waiting.get(frame.call):
                    frames.put(frame)
        self._end_calls()

    def _on_end(self, status: int) -> None:
        self._status = status
        with self._pidfd_lock:
            self._has_ended.set()
            os.close(self._pidfd)
        # Child processes may have copies of its end of the connection.
        self._channel.close()

    def _end_calls(self) -> None:
        for frames in list(self._waiting.values()):
            frames.put(None)


def _save_part(part: Part) -> Path:
    path: Path = part._path
    return path


def _no_part(path: Path) -> Part:
    raise AssertionError("no parts here")


def _show(facts: tuple[str, int, int | None], shown: tuple[str, int]) -> tuple[str, int]:
    """Reports a worker's progress as that of the move in this context."""
    phase, done_bytes, total_bytes = facts
    current = progress.current()
    if phase != shown[0] or done_bytes < shown[1]:
        current.enter(phase, total_bytes)
        shown = phase, 0
    if done_bytes > shown[1]:
        current.advance(done_bytes - shown[1])
    else:
        current.beat()
    return phase, done_bytes


def _log(frame: Frame) -> None:
    with contextlib.suppress(Exception):  # a record with an object of the engine's own modules
        record = logging.makeLogRecord(frame.unpickled(_no_part, installed_only=True))
        logging.getLogger(record.name).handle(record)


def _cause(status: int | None) -> Sentence:
    """Returns what a status of `os.waitpid` tells; None or -1: unknown."""
    if status is None or status == -1:
        return Sentence("its cause is unknown", "原因未知")
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        if name == "SIGKILL":
            return Sentence(
                "it was killed (SIGKILL), by another program or because main memory was full (see dmesg)",
                "它被强制结束（SIGKILL）：由其他程序所为，或因内存不足（查看 dmesg）",
            )
        return Sentence(f"it crashed in native code ({name})", f"它在原生代码中崩溃（{name}）")
    code = os.waitstatus_to_exitcode(status)
    return Sentence(f"it exited with code {code}", f"它以退出码 {code} 结束")
