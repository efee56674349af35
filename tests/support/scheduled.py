"""Replacements by `scheduler.Scheduler` for the classes of `threading`: each operation is a possible switch."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scheduler import Scheduler

#: Files whose frames are skipped in labels.
OWN = {__file__, os.path.join(os.path.dirname(__file__), "scheduler.py")}


class Abandoned(BaseException):
    """Ends a thread that is no longer needed."""


class _Part:
    """An object of one scheduler, with a queue of waiting threads; labelled by kind, number and creating line."""

    _scheduler: Scheduler

    def __init__(self) -> None:
        kind, frame = type(self).__name__, sys._getframe(1)
        while frame.f_code.co_filename in OWN and frame.f_back:
            frame = frame.f_back
        self._scheduler._counts[kind] += 1
        site = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        self._label = f"{kind}-{self._scheduler._counts[kind]}({site})"
        self._queue: list[Any] = []

    def _point(self, operation: str) -> None:
        self._scheduler._point(operation, self._label)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()


class Lock(_Part):
    _reentrant = False
    _owner: Any = None
    _count = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if timeout != -1 and (timeout < 0 or not blocking):
            raise ValueError("a timeout is not negative, and only for a blocking call")
        self._point("acquire")
        if self._reentrant and self._owner is self._scheduler._here():
            self._count += 1
            return True
        if self._owner is not None and not blocking and not self._scheduler._stopping:
            return False
        deadline_s = self._scheduler._deadline(None if timeout == -1 else timeout)
        # Waiting and new threads compete equally, as in CPython.
        while self._owner is not None and not self._scheduler._stopping:
            if not self._scheduler._block(self._queue, "wait for", self, deadline_s):
                return False
        self._owner, self._count = self._scheduler._here(), 1
        return True

    def release(self) -> None:
        try:
            self._point("release")
        finally:  # also in an abandoned thread
            mine = self._owner is self._scheduler._here() if self._reentrant else self._owner is not None
            if mine and self._count > 1:
                self._count -= 1
            elif mine:
                self._owner, self._count = None, 0
                self._scheduler._wake(self._queue)
            elif not self._scheduler._stopping:
                raise RuntimeError("cannot release un-acquired lock")
        self._point("released")


class RLock(Lock):
    _reentrant = True

    def _is_owned(self) -> bool:
        return self._owner is self._scheduler._here()


class Thread(_Part):
    """If started outside a run, begins with the next one. Joining threads wait in its queue."""

    _started = _alive = _woken = False
    _waits: tuple[str, Any] | None = None
    _os_ident = 0

    def __init__(self, group=None, target=None, name=None, args=(), kwargs=None, *, daemon=None) -> None:
        super().__init__()
        self._scheduler._counts["of all threads"] += 1
        self._number = self._scheduler._counts["of all threads"]
        self.name = name or f"Thread-{self._number}"
        self.daemon = self._scheduler._here().daemon if daemon is None and self._number > 1 else bool(daemon)
        self._target, self._args, self._kwargs = target, args, kwargs or {}
        self._label = f"{self._number}:{self.name}"
        self._priority = self._scheduler._random.random()
        self._baton = threading.Lock()
        self._baton.acquire()

    @property
    def ident(self) -> int | None:
        return self._number if self._started else None

    def run(self) -> None:
        if self._target is not None:
            self._target(*self._args, **self._kwargs)

    def start(self) -> None:
        if self._started:
            raise RuntimeError("threads can only be started once")
        if self._scheduler._stopping:
            raise Abandoned
        self._started = self._alive = True
        self._scheduler._threads.append(self)
        if self._scheduler._here() is not self._scheduler._main:
            self._open()
        self._scheduler._ready.append(self)
        self._point("start")

    def is_alive(self) -> bool:
        self._point("is_alive")
        return self._alive

    def join(self, timeout: float | None = None) -> None:
        if not self._started or self._scheduler._here() is self:
            raise RuntimeError("cannot join a thread that was not started, or the current one")
        self._point("join")
        if self._alive:
            self._scheduler._block(self._queue, "join", self, self._scheduler._deadline(timeout))

    def _open(self) -> None:
        self._os_thread = threading.Thread(target=self._begin, name=self._label, daemon=True)
        self._os_thread.start()
        self._os_ident = self._os_thread.ident

    def _begin(self) -> None:
        scheduler = self._scheduler
        self._baton.acquire()
        try:
            if not scheduler._stopping:
                self.run()
                scheduler._record(self, "end", "")
        except Abandoned:
            pass
        except BaseException as error:
            if not scheduler._stopping:
                scheduler._verdict = error
        scheduler._ended(self)
