"""The worker process: builds one engine, moves its memory, and answers the manager's calls.

The main thread receives; each call runs in a thread of its own, since reading may overlap a request. The engine, its
resident and the device belong to this process.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import itertools
import logging
import os
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
from ..errors import PartGone
from ..memory.engine import EngineResident
from ..memory.kept import KeptWeights, index_of, named_tensors, offered
from ..memory.self_moving import register
from ..memory.self_moving.orphans import MARK
from ..observability.error_classification import device_is_lost, empty_frames, is_out_of_device_memory
from ..progress import Progress, reporting
from ..random_state import RandomState
from ..remote_errors import recorded
from . import torch_settings
from .calls import END, Answer, Ask, Call, Load, Move, NextItem, Read, Setup, SetValue, Sizes, Stream, Use
from .logs import SentLog
from .messages import Channel, Frame, Kind, Packed, packed, pickled
from .process_name import name_process

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 0.05
"""Shortest interval of progress reports within a phase."""


def serve(connection: socket.socket) -> None:
    """Serves one manager until it closes the connection."""
    channel = Channel(connection)
    worker = _Worker(channel)
    with contextlib.suppress(EOFError, OSError):
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
        self._context_bytes = 0
        self._engine: Any = None
        self._resident: EngineResident | None = None
        #: The parts of the engine whose weights the loader takes if they outlive a worker.
        self._parts: list[str] = []
        self._calls: EngineCalls | None = None
        #: Objects without a path in the engine, by token; see `Held`.
        self._held: dict[int, Held] = {}
        self._streams: dict[int, _Stream] = {}
        #: Others than those of earlier workers, whose objects the manager may still have.
        self._numbers = itertools.count(time.monotonic_ns())
        self._random: RandomState | None = None
        self._modules = len(sys.modules)

    def take(self, frame: Frame) -> None:
        if frame.kind is Kind.CALL:
            cancellation = self._cancellations[frame.call] = Cancellation()
            self._threads.submit(self._run, frame, cancellation)
        elif frame.kind is Kind.CANCEL:
            if cancelled := self._cancellations.get(frame.call):
                cancelled.cancel()
            else:  # answered already, or not received: the manager does not wait for its end
                self._channel.send(Kind.ERROR, frame.call)
        elif frame.kind is Kind.PING:
            self._channel.send(Kind.PONG, frame.call)

    def _run(self, frame: Frame, cancellation: Cancellation) -> None:
        before: RandomState | None = None
        lost = False
        try:
            ask = frame.unpickled(self._load_part)
            self._forget(ask.forgotten)
            before = self._continue_random(ask)
            with contextlib.ExitStack() as stack:
                stack.enter_context(cancelled_by(cancellation))
                if ask.moves:
                    stack.enter_context(self._progress(frame.call))
                if ask.settings is not None:
                    ask.settings.enter(stack)
                kind, content = Kind.ANSWER, self._packed(_ANSWERS[type(ask)](self, ask))
        except BaseException as error:
            kind, content, lost = Kind.ERROR, self._failure(error), self._is_lost(error)
            self._make_room(error)
            error.__traceback__ = None
        answer = Answer(content.data, self._sizes(), self._drawn(before), lost)
        try:
            self._channel.send(kind, frame.call, content._replace(data=pickled(answer)))
        except MemoryError as error:
            answer.content = self._failure(error).data
            self._channel.send(Kind.ERROR, frame.call, packed(answer))
        finally:
            self._cancellations.pop(frame.call, None)

    def _packed(self, value: Any) -> Packed:
        try:
            return packed(value, self._save_part)
        except MemoryError:
            raise
        except Exception:  # cannot be pickled: the manager gets a proxy
            return packed(Part(_KEEPER, (Held(value, self._engine),)), self._save_part)

    def _failure(self, error: BaseException) -> Packed:
        return packed(recorded(error, lambda value: pickled(value, None, self._save_part)))

    def _is_lost(self, error: BaseException) -> bool:
        return self._device is not None and device_is_lost(error, self._device)

    def _make_room(self, error: BaseException) -> None:
        """After an error of a full device: frees what the failed call has left behind."""
        if self._device is not None and is_out_of_device_memory(error):
            empty_frames(error)
            gc.collect()
            with contextlib.suppress(Exception):
                self._device.settle()

    # -- random states --------------------------------------------------------------------------------------------

    def _continue_random(self, ask: Ask) -> RandomState | None:
        """Continues with the manager's states; returns the current ones if the call may change them."""
        if ask.random is not None:
            ask.random.continue_here(self._random, cuda=True)
            self._random = ask.random
        return RandomState(cuda=False) if ask.draws else None

    def _drawn(self, before: RandomState | None) -> RandomState | None:
        """Returns the random states if they have changed."""
        if before is None or not (after := RandomState(cuda=False)).differs_from(before):
            return None
        self._random = after
        return after

    @contextlib.contextmanager
    def _progress(self, call: int) -> Iterator[None]:
        with reporting(_SentProgress(self._channel, call)):
            yield

    def _sizes(self) -> Sizes:
        resident = self._resident
        if resident is None:
            return Sizes(context_bytes=self._context_bytes)
        return Sizes(resident.device_bytes, resident.host_bytes, resident.array_bytes, resident.usable,
                     resident.moves_itself, bool(self._parts), self._context_bytes, resident.pids,
                     len(sys.modules) - self._modules)  # fmt: skip

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
        if path and isinstance(token := path[0], Token):
            if token.number not in self._held:
                raise PartGone(token.text.removeprefix(".(a ").removesuffix(")"))
            return (self._held[token.number], *path[1:])
        return path

    def _forget(self, numbers: list[int]) -> None:
        for number in numbers:
            self._held.pop(number, None)
            if number in self._streams:
                self._next(NextItem(number, close=True))

    # -- answers --------------------------------------------------------------------------------------------------

    def _set_up(self, ask: Setup) -> None:
        mark = {MARK: os.environ[MARK]}
        os.environ.clear()
        os.environ.update(ask.environ | mark)
        with contextlib.suppress(OSError):
            os.chdir(ask.folder)
        sys.path[:] = ask.path
        sys.argv[:] = ask.argv
        logging.root.addHandler(SentLog(self._channel))
        for name, level in ask.log_levels.items():
            logging.getLogger(name).setLevel(level)
        for name, moves in ask.own_moves.items():
            register(name, moves)
        torch_settings.use(ask.torch)
        import torch  # noqa: F401 - so that its random state is restored

        self._device = ask.device
        self._device.ensure_usable()
        self._context_bytes = self._device.bytes_of([os.getpid()]) or 0

    def _load(self, ask: Load) -> None:
        assert self._device is not None, "a worker is set up before its load"
        name_process(f"gpu-worker:{ask.name}")
        if ask.random_state is not None:
            ask.random_state.put_back()
        with offered(ask.kept) as self._parts:
            self._engine = ask.load()
        ask.kept = None
        if self._engine is None:
            raise TypeError(f"The loader of {ask.name!r} returned None; let it return the engine.")
        self._resident = EngineResident(self._engine, self._device, ask.skip)
        self._resident.loaded.mirror.shared = bool(self._parts)
        self._calls = EngineCalls(self._engine, _KEEPER, lambda tensor: False)  # sending an answer copies it

    def _move(self, ask: Move) -> tuple[int, KeptWeights | None]:
        assert self._resident is not None, "a model that is moved is loaded"
        keeps = ask.name == "offload" and self._parts
        named = self._tried(named_tensors, self._engine, self._parts) if keeps else None
        moved: int = getattr(self._resident, ask.name)()
        kept = self._tried(index_of, self._resident.loaded, named) if named else None
        if ask.name == "release":
            self._resident = self._calls = self._engine = None
            self._held.clear()
            self._streams.clear()
        return moved, kept

    def _tried(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Returns the result; None after an error, which must not make an offload fail."""
        try:
            return work(*arguments)
        except Exception as error:
            logger.warning("The weights of %r will not outlive this process: %s", self._parts, error)
            return None

    def _read(self, ask: Read) -> Any:
        return self._ready.read(self._path(ask.path))

    def _use(self, ask: Use) -> Any:
        return self._ready.use(self._path(ask.path), ask.use)

    def _call(self, ask: Call) -> Any:
        answer = self._ready.call(self._path(ask.path), ask.arguments, ask.keywords, ask.streams)
        if isinstance(answer, GeneratorType):
            number = next(self._numbers)
            self._streams[number] = _Stream(answer)
            return Stream(number)
        return answer

    def _next(self, ask: NextItem) -> Any:
        stream, item = self._streams.get(ask.stream), END
        if stream is None:
            return END
        try:
            item = stream.step(ask)
            return item
        finally:
            if item is END:
                self._streams.pop(ask.stream, None)
                stream.end()

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


class _Stream:
    """A generator, in a thread of its own: between its steps it may be within `torch.no_grad`, which is a thread's.

    It has the settings of its first step, in which its code begins to run.
    """

    def __init__(self, items: GeneratorType[Any, Any, Any]) -> None:
        self._items = items
        self._thread = ThreadPoolExecutor(1, "gpu-worker-stream")
        self._settings: contextlib.ExitStack | None = None

    def step(self, ask: NextItem) -> Any:
        """Returns the next item; `END` after the last one or a close."""
        return self._thread.submit(contextvars.copy_context().run, self._step, ask).result()

    def _step(self, ask: NextItem) -> Any:
        if ask.close:
            self._items.close()
            return END
        if self._settings is None:
            self._settings = contextlib.ExitStack()
            if ask.settings is not None:
                ask.settings.enter(self._settings)
        return next(self._items, END)

    def end(self) -> None:
        if self._settings is not None:
            self._thread.submit(self._settings.close)
        self._thread.shutdown(wait=False)


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
            self._channel.send(Kind.PROGRESS, self._call, packed((phase, done_bytes, total_bytes)))
