"""The worker process: builds one engine, moves its memory, and answers the manager's calls.

The main thread receives; each call runs in a thread of its own, since reading may overlap a request. The engine, its
resident and the device belong to this process.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import logging.handlers
import os
import queue
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import GeneratorType
from typing import Any

from ..cancellation import Cancellation, cancelled_by
from ..contracts import Device
from ..engines.engine_calls import EngineCalls
from ..engines.part_proxy import Held, Part, Path, Token, follow, unwrapped
from ..memory.engine import EngineResident
from ..observability.error_classification import device_is_lost, is_out_of_device_memory
from ..progress import Progress, reporting
from ..random_state import RandomState
from .calls import END, Answer, Call, Load, Move, NextItem, Read, Setup, SetValue, Sizes, Stream, Use
from .messages import Channel, Frame, Kind, pickled
from .remote_errors import recorded

PROGRESS_EVERY_S = 0.05
"""Shortest interval of progress reports within a phase."""


def serve(connection: socket.socket) -> None:
    """Serves one manager until it closes the connection."""
    channel = Channel(connection)
    worker = _Worker(channel)
    with contextlib.suppress(EOFError):
        while True:
            worker.take(channel.receive())


class _Keeper:
    """The owner of parts in this process; they are sent by path, and used by the manager."""


_KEEPER = _Keeper()


class _Worker:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._threads = ThreadPoolExecutor(16, "gpu-worker-call")
        self._cancellations: dict[int, Cancellation] = {}
        self._device: Device | None = None
        self._engine: Any = None
        self._resident: EngineResident | None = None
        self._calls: EngineCalls | None = None
        #: Objects without a path in the engine, by token; see `Held`.
        self._held: dict[int, Held] = {}
        self._streams: dict[int, GeneratorType[Any, Any, Any]] = {}
        self._numbers = itertools.count(1)
        self._random: RandomState | None = None
        self._modules = len(sys.modules)

    def take(self, frame: Frame) -> None:
        if frame.kind is Kind.CALL:
            cancellation = self._cancellations[frame.call] = Cancellation()
            self._threads.submit(self._run, frame, cancellation)
        elif frame.kind is Kind.CANCEL:
            if cancelled := self._cancellations.get(frame.call):
                cancelled.cancel()
        elif frame.kind is Kind.PING:
            self._channel.send(Kind.PONG, frame.call)
        elif frame.kind is Kind.FORGET:
            self._held.pop(frame.call, None)

    def _run(self, frame: Frame, cancellation: Cancellation) -> None:
        try:
            with cancelled_by(cancellation):
                try:
                    self._send(frame.call, self._answer(frame))
                except BaseException as error:
                    self._fail(frame.call, error)
                    error.__traceback__ = None
        except OSError:
            os._exit(1)  # the manager has gone
        finally:
            self._cancellations.pop(frame.call, None)

    def _send(self, call: int, answer: Answer) -> None:
        try:
            self._channel.send(Kind.ANSWER, call, answer, self._save_part)
        except OSError:
            raise
        except Exception:  # cannot be pickled: the manager gets a proxy
            answer.value = Part(_KEEPER, (Held(answer.value, self._engine),))
            self._channel.send(Kind.ANSWER, call, answer, self._save_part)

    def _fail(self, call: int, error: BaseException) -> None:
        lost = self._device is not None and device_is_lost(error, self._device)
        record = recorded(error, lambda value: pickled(value, None, self._save_part))
        if is_out_of_device_memory(error) and self._device is not None:
            error.__traceback__ = None
            gc.collect()
            with contextlib.suppress(Exception):
                self._device.settle()
        self._channel.send(Kind.ERROR, call, (record, self._sizes(), lost))

    def _answer(self, frame: Frame) -> Answer:
        ask = frame.unpickled(self._load_part)
        before = None
        if ask.random is not None:
            ask.random.continue_here(self._random, cuda=True)
            self._random = ask.random
        if ask.draws:
            before = RandomState(cuda=False)
        with self._progress(frame.call) if ask.moves else contextlib.nullcontext():
            value = _ANSWERS[type(ask)](self, ask)
        drawn = None
        if before is not None and (after := RandomState(cuda=False)).differs_from(before):
            self._random = drawn = after
        return Answer(value, self._sizes(), drawn)

    @contextlib.contextmanager
    def _progress(self, call: int) -> Iterator[None]:
        with reporting(_SentProgress(self._channel, call)):
            yield

    def _sizes(self) -> Sizes:
        resident = self._resident
        if resident is None:
            return Sizes()
        return Sizes(resident.device_bytes, resident.host_bytes, resident.array_bytes, resident.usable,
                     resident.moves_itself, len(sys.modules) - self._modules)  # fmt: skip

    # -- parts ----------------------------------------------------------------------------------------------------

    def _save_part(self, part: Part) -> Path:
        path: Path = part._path
        if path and isinstance(path[0], Held):
            number = next(self._numbers)
            self._held[number] = path[0]
            return (Token(number, str(path[0])), *path[1:])
        return path

    def _load_part(self, path: Path) -> Part:
        return Part(_KEEPER, self._path(path))

    def _path(self, path: Path) -> Path:
        if path and isinstance(path[0], Token):
            return (self._held[path[0].number], *path[1:])
        return path

    # -- answers --------------------------------------------------------------------------------------------------

    def _set_up(self, ask: Setup) -> None:
        os.environ.clear()
        os.environ.update(ask.environ)
        with contextlib.suppress(OSError):
            os.chdir(ask.folder)
        sys.path[:] = ask.path
        sys.argv[:] = ask.argv
        root = logging.getLogger()
        root.setLevel(ask.log_level)
        root.addHandler(_SentLog(self._channel))

    def _load(self, ask: Load) -> None:
        import torch  # noqa: F401 - so that its random state is restored

        self._device = ask.device
        self._device.ensure_usable()
        if ask.random_state is not None:
            ask.random_state.put_back()
        self._engine = ask.load()
        if self._engine is None:
            raise TypeError(f"The loader of {ask.name!r} returned None; let it return the engine.")
        self._resident = EngineResident(self._engine, self._device, ask.skip)
        self._calls = EngineCalls(self._engine, _KEEPER, lambda tensor: False)  # sending an answer copies it

    def _move(self, ask: Move) -> int:
        assert self._resident is not None, "a model that is moved is loaded"
        moved: int = getattr(self._resident, ask.name)()
        if ask.name == "release":
            self._resident = self._calls = self._engine = None
            self._held.clear()
            self._streams.clear()
        return moved

    def _read(self, ask: Read) -> Any:
        return self._ready.read(self._path(ask.path))

    def _use(self, ask: Use) -> Any:
        return self._ready.use(self._path(ask.path), ask.use)

    def _call(self, ask: Call) -> Any:
        answer = self._ready.call(self._path(ask.path), ask.arguments, ask.keywords, ask.streams)
        if isinstance(answer, GeneratorType):
            number = next(self._numbers)
            self._streams[number] = answer
            return Stream(number)
        return answer

    def _next(self, ask: NextItem) -> Any:
        stream = self._streams.get(ask.stream)
        if stream is None:
            return END
        if not ask.close:
            try:
                return next(stream)
            except BaseException as error:
                self._streams.pop(ask.stream, None)
                if isinstance(error, StopIteration):
                    return END
                raise
        self._streams.pop(ask.stream, None)
        stream.close()
        return END

    def _set(self, ask: SetValue) -> None:
        setattr(follow(self._path(ask.path), self._engine), ask.name, unwrapped(ask.value, self._engine))

    @property
    def _ready(self) -> EngineCalls:
        assert self._calls is not None, "a model that is called is loaded"
        return self._calls


_ANSWERS: dict[type, Callable[[_Worker, Any], Any]] = {
    Setup: _Worker._set_up, Load: _Worker._load, Move: _Worker._move, Read: _Worker._read, Use: _Worker._use,
    Call: _Worker._call, NextItem: _Worker._next, SetValue: _Worker._set,
}  # fmt: skip


class _SentProgress(Progress):
    """Sends phases at once, and bytes and beats at intervals."""

    def __init__(self, channel: Channel, call: int) -> None:
        super().__init__("")
        self._channel = channel
        self._call = call
        self._sent_s = 0.0
        self._sent_phase = ""
        self.changed = self._send

    def beat(self) -> None:
        super().beat()
        self._send()

    def _send(self) -> None:
        now_s, (phase, done_bytes, total_bytes) = time.monotonic(), self.facts
        if phase == self._sent_phase and now_s < self._sent_s + PROGRESS_EVERY_S and done_bytes != total_bytes:
            return
        self._sent_s, self._sent_phase = now_s, phase
        with contextlib.suppress(OSError):
            self._channel.send(Kind.PROGRESS, self._call, (phase, done_bytes, total_bytes))


class _SentLog(logging.handlers.QueueHandler):
    """Sends log records to the manager's process."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(queue.SimpleQueue())
        self._channel = channel

    def enqueue(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._channel.send(Kind.LOG, 0, vars(record))
