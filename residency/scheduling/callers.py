"""Records where a lease was taken, and checks whether that code can continue while another request waits for the lease.

A context (`contextvars`) does not identify the holder of a lease: frameworks run each step of a generator with a fresh
copy of the context, often in another thread, and thread pools do not pass contexts. Call stacks contain more:

- A generator keeps its frame from step to step: requests under that frame belong to the same flow of control.
- A function whose frame is on no stack has returned or is suspended.
- A thread that waits in `Thread.join` or `Future.result` has the awaited object in its frame.

A frame is identified by a `FunctionCall` in its ``f_trace``: a reference to the frame would keep its local variables
and its callers alive, and the address of a frame that has ended is reused.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.thread
import gc
import inspect
import math
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePath
from types import CodeType, FrameType
from typing import Any

from ..locks import renewed_in_children

_SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

#: Modules between a lease and the calling code.
_INTERNAL = frozenset({
    __name__, "contextlib", "gpu_manager", "tts_gpu_managed", "residency.scheduling.admission",
    "residency.scheduling.lease", "residency.engines.part_proxy", "residency.engines.answers",
})  # fmt: skip

#: Modules that run several tasks in one thread.
_POOLS = ("concurrent.futures", "anyio")
_RUNNERS = (*_POOLS, "asyncio", "threading")

_collecting = renewed_in_children(threading.RLock())

_JOIN = threading.Thread.join.__code__
_RESULTS = frozenset({concurrent.futures.Future.result.__code__, concurrent.futures.Future.exception.__code__})
_WAITS = frozenset({concurrent.futures.wait.__code__, concurrent.futures.as_completed.__code__})
_BLOCKING = frozenset({_JOIN}) | _RESULTS | _WAITS
_WORK_ITEM = concurrent.futures.thread._WorkItem.run.__code__


class FunctionCall:
    """One execution of a function, from its call to its end. It is stored in ``f_trace`` of the frame and ends with it.

    Python uses ``f_trace`` only while a thread is traced. A tracer may find a call there and call it, without effect.
    Where a tracer has set its own function, the call keeps the frame instead: then a lost lease under that frame
    is not found. If a debugger clears ``f_trace`` of a running frame, the frame counts as another execution.
    """

    __slots__ = ("_frame",)

    def __init__(self, traced: FrameType | None) -> None:
        self._frame = traced

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        return None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FunctionCall):
            return NotImplemented
        return self is other or (self._frame is not None and self._frame is other._frame)

    def __hash__(self) -> int:
        return id(self if self._frame is None else self._frame)

    def is_of(self, frame: FrameType) -> bool:
        """Returns whether the frame, of any thread, belongs to this execution."""
        return frame.f_trace is self or frame is self._frame


@dataclass(eq=False)
class CallSite:
    """The stack of a thread at its call for a lease. Never changed (frozen would be slow to create).

    Attributes:
        thread: `threading.get_ident` of the thread.
        code, line: the innermost frame outside of this library.
        frame: that frame; None if it is a thread pool's, which outlives the task that takes the lease.
        generators: the generators and coroutines of the stack outside of this library, innermost first.
        token: unique to that thread, since idents and names are reused; returns None once the thread has ended.
        is_suspended: whether a generator yielded here; ``frame`` is then the code that made its last step.
    """

    thread: int
    code: CodeType
    line: int
    frame: FunctionCall | None
    generators: tuple[FunctionCall, ...]
    token: weakref.ref[_Alive]
    is_suspended: bool = False

    @property
    def where(self) -> str:
        """File, line and function, such as ``web/speech.py:146 in clone``."""
        file = "/".join(PurePath(self.code.co_filename).parts[-2:])
        return f"{file}:{self.line} in {self.code.co_name}"

    @property
    def thread_name(self) -> str:
        """The thread's name; its ident, with "(ended)", after its end."""
        names = (one.name for one in threading.enumerate() if one.ident == self.thread)
        return f"{self.thread} (ended)" if self.token() is None else next(names, str(self.thread))

    def executes(self) -> bool:
        """Returns whether the function that took the lease is on a stack: not returned and not suspended."""
        if self.frame is None or self.is_suspended:
            return False
        return any(self.frame.is_of(frame) for top in _current_frames().values() for frame in _below(top))

    def executes_here(self) -> bool:
        """Returns whether that function, or the one that made a generator's last step, is on this thread's stack."""
        return self.frame is not None and any(map(self.frame.is_of, _stack(threading.get_ident())))

    def suspended(self) -> CallSite:
        """Returns the same site, for a generator that is about to yield."""
        return replace(self, is_suspended=True)

    def same_flow(self, other: CallSite) -> bool:
        """Returns whether the generator under which the lease was taken here makes the request there."""
        return bool(self.generators) and self.generators[0] in other.generators

    def resumed_by(self, other: CallSite) -> bool:
        """Returns whether a generator that resumes the code with the lease is on that stack, so it cannot do so now."""
        return not set(self.generators).isdisjoint(other.generators)

    def waits_for(self, other: CallSite) -> float | None:
        """Returns the seconds that this thread waits, in `Thread.join` or for futures, for the work of the other one.

        ``math.inf``: without a time-out; None: it does not wait for it. Time-outs count from the start of the wait.
        """
        if self.token() is None or other.token() is None:
            return None  # a thread has ended: its ident may belong to another one now
        tasks = {id(_local(frame, "self").future) for frame in _stack(other.thread) if frame.f_code is _WORK_ITEM}
        waits = (_time_out(frame) for frame in _stack(self.thread) if _waits_for(frame, other.thread, tasks))
        return max(waits, default=None)


def call_site(made_at: tuple[CodeType, int] | None = None) -> CallSite:
    """Returns the stack of this thread. Takes some microseconds.

    ``made_at``: code and line to record if the thread runs only a thread pool's code.
    """
    frame: FrameType | None = sys._getframe(1)
    caller: FrameType | None = None
    generators: list[FunctionCall] = []
    while frame is not None:
        suspendable = frame.f_code.co_flags & _SUSPENDABLE
        if (caller is None or suspendable) and frame.f_globals.get("__name__") not in _INTERNAL:
            caller = caller or frame
            if suspendable:
                generators.append(_call_of(frame))
        outermost, frame = frame, frame.f_back
    if caller is None:
        caller = outermost
    in_a_runner = _module(caller).startswith(_RUNNERS)
    call = None if in_a_runner else _call_of(caller)
    code, line = made_at if in_a_runner and made_at else (caller.f_code, caller.f_lineno)
    return CallSite(threading.get_ident(), code, line, call, tuple(generators), _this_thread.token)


class _Alive:
    """Exists as long as the thread that created it."""

    __slots__ = ("__weakref__",)


class _ThisThread(threading.local):
    def __init__(self) -> None:
        self.alive = _Alive()
        self.token = weakref.ref(self.alive)


_this_thread = _ThisThread()


def is_this_thread(site: CallSite) -> bool:
    """Returns whether the site's thread is the calling one, not another with the same ident."""
    return site.token is _this_thread.token


def in_thread_pool() -> bool:
    """Returns whether this thread is in a pool, where another thread may resume a generator that this one suspends."""
    return any(_module(frame).startswith(_POOLS) for frame in _stack(threading.get_ident()))


def _waits_for(frame: FrameType, thread: int, tasks: set[int]) -> bool:
    code = frame.f_code
    if code not in _BLOCKING:
        return False
    if code is _JOIN:
        return bool(_local(frame, "self").ident == thread)
    if code in _RESULTS:
        return id(_local(frame, "self")) in tasks
    futures = _local(frame, "fs")
    return isinstance(futures, set) and not tasks.isdisjoint(map(id, futures))


def _time_out(frame: FrameType) -> float:
    timeout = _local(frame, "timeout")
    return math.inf if timeout is None else float(timeout)


def _stack(thread: int) -> Iterator[FrameType]:
    """Yields the frames of a thread, innermost first; none if it has ended."""
    return _below(_current_frames().get(thread))


def _current_frames() -> dict[int, FrameType]:
    """Returns the innermost frame of each thread, without a garbage collection meanwhile.

    Up to Python 3.11, a finalizer that gives up the GIL there stops the whole process: Python holds the lock of its
    list of threads, for which other threads wait with the GIL (https://github.com/python/cpython/issues/106883).
    """
    with _collecting:
        enabled = gc.isenabled()
        try:
            gc.disable()
            return sys._current_frames()
        finally:
            if enabled:
                gc.enable()


def _below(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _call_of(frame: FrameType) -> FunctionCall:
    """Returns the call of a frame of this thread; creates it if necessary."""
    found = frame.f_trace
    if isinstance(found, FunctionCall):
        return found
    call = FunctionCall(None if found is None else frame)
    if found is None:
        frame.f_trace = call
    return call


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def _local(frame: FrameType, name: str) -> Any:
    return frame.f_locals.get(name)
