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
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from .. import cancellation, progress
from ..engines.part_proxy import Part, Path, Token
from ..errors import InvalidInput, ManagerClosed, RequestStopped, TensorAway, WorkerDied
from ..random_state import RandomState
from ..remote_errors import rebuilt
from ..sentences import Sentence
from .calls import Answer, Ask, Move, Sizes
from .logs import log
from .messages import Channel, Frame, Kind, Packed, packed, unpickled
from .spawner import Spawner
from .torch_settings import CallSettings

logger = logging.getLogger(__name__)

STOPS_WITHIN_S = 10.0
"""Time for the engine to stop a cancelled call; then the worker is ended."""

PING_EVERY_S = 5.0
"""Interval of the checks whether a worker that has a call still reacts."""

HANGS_AFTER_S = 120.0
"""Time without a reaction, or without progress of a move off the device, after which a worker is ended."""

KILLED_WITHIN_S = 10.0
"""Longest wait for the end of a worker that was killed; the system may still free its memory."""

_REPORTED_WITHIN_S = 2.0

_CANCELLED = object()
_Received = Frame | object | None


class WorkerProcess:
    """One worker. Any thread may call it; the calls run at the same time."""

    def __init__(self, name: str, spawner: Spawner, hangs_after_s: float = HANGS_AFTER_S) -> None:
        """Forks the worker. ``name``: that of the model, for messages. Raises `WorkerDied`."""
        self.name = name
        self.sizes = Sizes()
        self.checkpointed = False
        #: Called once after its end, in another thread.
        self.on_end: Callable[[], object] = lambda: None
        self._hangs_after_s = hangs_after_s
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[_Received]] = {}
        self._random: RandomState | None = None
        self._forgotten: deque[int] = deque()
        self._reason: Sentence | None = None
        self._heard = 0  # number of frames
        self._owner_pid = os.getpid()
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        try:
            with theirs:
                self._child = spawner.spawn(theirs, self._ended)
            threading.Thread(target=self._receive, name=f"gpu-worker-{name}", daemon=True).start()
        except BaseException as error:
            self._channel.close()  # then it ends
            if isinstance(error, OSError):
                said = [each for each in error.args if isinstance(each, Sentence)]
                why = said[0] if said else Sentence.of(str(error))
                reason = Sentence(f"it did not start ({why.en})", f"它未能启动（{why.zh}）")
                raise WorkerDied(name, reason) from error
            raise

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def ended(self) -> bool:
        """Whether the process has ended, or is being ended."""
        return self._reason is not None or self._child.is_gone

    @property
    def modules(self) -> int:
        return self.sizes.modules

    @property
    def context_bytes(self) -> int:
        return self.sizes.context_bytes

    def ask(self, ask: Ask, keeper: Any = None, content: Packed | None = None) -> Any:
        """Sends a call and waits for its answer. Parts in it are those of ``keeper``. ``content``: its pickle, if made.

        Raises the worker's error; `WorkerDied` if the process ends; `RequestStopped` if the request in this context
        was cancelled and the engine did not stop.
        """
        if os.getpid() != self._owner_pid:
            raise ManagerClosed  # a forked child: the connection belongs to the parent
        if self.checkpointed:
            raise TensorAway(Sentence(f"The engine of {self.name!r}", f"{self.name!r} 的引擎"), False)
        if ask.draws:
            ask.settings = CallSettings.here()
            here = RandomState(cuda=False)
            if here.differs_from(self._random):
                ask.random = self._random = here
        while self._forgotten:
            with contextlib.suppress(IndexError):  # another thread was first
                ask.forgotten.append(self._forgotten.popleft())
        try:
            content = content or packed(ask, _save_part)
        except Exception as error:
            raise InvalidInput(
                f"This cannot be sent to the worker process of {self.name!r} ({error}): let it refer to nothing that "
                f"belongs to this process (locks, files, models)",
                f"无法发送到 {self.name!r} 的工作进程（{error}）：请不要让它引用属于本进程的对象（锁、文件、模型）",
            ) from error
        number, frames = next(self._numbers), queue.SimpleQueue[_Received]()
        self._waiting[number] = frames
        try:
            if self.ended:
                raise self.died()
            self._channel.send(Kind.CALL, number, content)
            if ask.draws and (current := cancellation.current()) is not None:  # moves go on
                current.on_cancel(lambda: frames.put(_CANCELLED))
            frame = self._wait(number, frames, isinstance(ask, Move) and ask.name != "restore")
        except OSError:
            raise self.died() from None
        except (WorkerDied, RequestStopped):
            raise
        except BaseException:  # an interrupt, at any moment
            self._stop_call(number, frames)
            raise
        finally:
            del self._waiting[number]
        return self._value(frame, keeper)

    def forget(self, number: int) -> None:
        """Drops an object or a stream of the worker, with the next call. Callable in a finalizer."""
        self._forgotten.append(number)

    @property
    def sends_here(self) -> bool:
        """Whether this thread cannot call: a finalizer runs while it sends another call."""
        return self._channel.sends_here

    def kill(self, reason: Sentence) -> None:
        """Ends the process at once, also while it is stopped or hangs. ``reason``: for `WorkerDied`."""
        self._reason = self._reason or reason
        self._child.kill()
        self._channel.close()

    def finish(self, within_s: float) -> None:
        """Closes the connection, so that the process ends; kills it if it has not ended in time. Waits for its end."""
        self._reason = self._reason or Sentence("it was released", "它已被释放")
        self._channel.close()
        if not self._child.has_ended.wait(within_s):
            self._child.kill()
            self._child.has_ended.wait(KILLED_WITHIN_S)

    def died(self) -> WorkerDied:
        """Returns the error about the end of the process."""
        if self._reason is None:
            self._child.has_ended.wait(_REPORTED_WITHIN_S)
        return WorkerDied(self.name, self._reason or _cause(self._child.status))

    # -- waiting --------------------------------------------------------------------------------------------------

    def _wait(self, number: int, frames: queue.SimpleQueue[_Received], leaves: bool) -> Frame:
        """``leaves``: the call moves the engine off the device, and must make progress."""
        stop_at_s, shown, steps = math.inf, ("", 0), 0
        silent_s, heard = 0.0, (self._heard, 0)
        while True:
            pause_s = max(0.0, min(PING_EVERY_S, stop_at_s - time.monotonic()))
            try:
                frame = frames.get(timeout=pause_s)
            except queue.Empty:
                if time.monotonic() >= stop_at_s:
                    self.kill(Sentence("it did not stop after a cancellation", "取消后它没有停止"))
                    raise RequestStopped from None
                # Sums of pauses: a clock would go on while this process is stopped.
                before, heard = heard, (0 if leaves else self._heard, steps)
                silent_s = silent_s + pause_s if before == heard else 0.0
                self._check_reaction(silent_s)
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
            shown, steps = _show(frame.unpickled(_no_part), shown), steps + 1

    def _check_reaction(self, silent_s: float) -> None:
        if silent_s >= self._hangs_after_s:
            self.kill(Sentence(f"it did not react for {silent_s:.0f} s", f"它在 {silent_s:.0f} 秒内没有响应"))
            return
        with contextlib.suppress(OSError):
            self._channel.send(Kind.PING, 0)

    def _stop_call(self, number: int, frames: queue.SimpleQueue[_Received]) -> None:
        """After Ctrl-C: waits until the call has ended, or ends the worker; a lease must not end before its call."""
        until_s = time.monotonic() + STOPS_WITHIN_S
        try:
            with contextlib.suppress(OSError):
                self._channel.send(Kind.CANCEL, number)
            while (frame := frames.get(timeout=max(0.0, until_s - time.monotonic()))) is not None:
                if isinstance(frame, Frame) and frame.kind is not Kind.PROGRESS:
                    return
        except BaseException:  # too long, or a second Ctrl-C
            self.kill(Sentence("it did not stop after an interrupt", "中断后它没有停止"))

    def _value(self, frame: Frame, keeper: Any) -> Any:
        def load_part(path: Path) -> Part:
            if path and isinstance(path[0], Token):  # without a path in the engine: freed with its last part here
                weakref.finalize(path[0], self.forget, path[0].number).atexit = False
            return Part(keeper, path)

        def load(data: bytes) -> Any:
            return unpickled(data, frame.buffers, load_part, True, frame.files)

        answer: Answer = frame.unpickled(_no_part)
        self.sizes = answer.sizes
        if answer.random is not None:
            answer.random.continue_here(self._random, cuda=False)
            self._random = answer.random
        if frame.kind is Kind.ANSWER:
            return load(answer.content)
        error = rebuilt(load(answer.content), load)
        try:
            if not answer.lost:
                raise error
            logger.error("%s: its worker process cannot use the device any more", self.name, exc_info=error)
            words = str(error).partition("\n")[0]
        finally:
            del error  # a cycle: its traceback has this frame
        self.kill(Sentence(f"the device failed for it ({words})", f"设备对它失效（{words}）"))
        raise self.died()

    # -- other threads --------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            while True:
                frame = self._channel.receive()
                self._heard += 1
                if frame.kind is Kind.LOG:
                    log(frame)
                elif frames := self._waiting.get(frame.call):
                    frames.put(frame)
        except EOFError:
            pass
        finally:
            if not self._child.has_ended.wait(_REPORTED_WITHIN_S):
                self._child.kill()  # it cannot be heard any more
            self._channel.close()
            for frames in list(self._waiting.values()):
                frames.put(None)

    def _ended(self) -> None:
        self._channel.close()  # child processes of the worker may have copies of its end
        self.on_end()


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


def _cause(status: int | None) -> Sentence:
    """Returns what a status of `os.waitpid` tells; None: its parent has ended."""
    if status is None:
        return Sentence("its cause is unknown, or the fork server has ended", "原因未知，或 fork 服务进程已结束")
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
