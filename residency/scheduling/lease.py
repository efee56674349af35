"""Leases: the right to use a model. The context of a thread or task contains its leases."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..contracts import Time
from ..receipts import Receipt
from .admission import Admission
from .held import LeaseData, held, held_requests
from .managed_model import LeaseRequest, ManagedModel
from .policies import keep_alive_seconds, seconds

_made: contextvars.ContextVar[tuple[weakref.ref[Lease], ...]] = contextvars.ContextVar("made_leases", default=())
_watch: contextvars.ContextVar[Callable[[Lease], object] | None] = contextvars.ContextVar("watch_leases", default=None)


class Lease(LeaseData):
    """The right to use one model; the model is not moved while the lease is held.

    A context manager for one use. Entering waits for its turn (one request at a time, in order of arrival), loads or
    restores the model and returns the engine. ``with`` blocks its thread. ``async with`` is for coroutines under any
    asyncio event loop: it blocks nothing, does not use the loop's executor, and does not wait at its end until the
    model has left the device; a cancelled task leaves the queue.

    At the end of a plain ``with`` a model of at most 64 MB has left the device, if that takes less than a quarter of a
    second. Larger models leave afterwards: the status shows ``moving``, and `offload` waits for the move.

    A nested lease of the same model in the same thread of control, or in work started with its context
    (`asyncio.to_thread`, `asyncio.create_task`), shares the first; the model is released when all have ended. The same
    holds for a generator that is resumed with another context or in another thread, and for a coroutine that creates a
    lease and enters it with `asyncio.to_thread`. If a lease is never exited, garbage collection releases it; this is
    triggered if the code that holds the lease has not executed for some seconds.

    With ``reading`` the lease shares the model with the current request, if any, else waits for its own turn: for
    reading values that no request changes.

    `cancel`, `place` and `discard` may be called from any thread.
    """

    #: Excludes leases from discovery: they refer to the manager and so to other models.
    not_of_the_engine = True

    def __init__(
        self,
        admission: Admission,
        managed: ManagedModel,
        timeout: Time = None,
        reading: bool = False,
        keep_warm: Time = None,
    ) -> None:
        self._admission = admission
        self._managed = managed
        self._timeout_s = None if timeout is None else seconds(timeout)
        self.reading = reading
        self.keep_warm_s = None if keep_warm is None else keep_alive_seconds(keep_warm)
        self._entered = self._ended = self._broken = False
        self._made_here = True
        #: The task of a coroutine that created it: it has a context of its own; a thread's may serve several tasks.
        task = _task()
        self._task = None if task is None else weakref.ref(task)
        #: Its current request, if it was entered in the context of its creation.
        self._request_here: LeaseRequest | None = None
        caller = sys._getframe(2)
        self.made_at = caller.f_code, caller.f_lineno
        made = [lease for reference in _made.get() if (lease := reference()) is not None and not lease._ended]
        if made:
            self.made_after = tuple([one._request_here for one in made if one._request_here and one._task])
        _made.set((*map(weakref.ref, made), weakref.ref(self)) if made else (weakref.ref(self),))

    def __enter__(self) -> Any:
        if not self._joins():
            try:
                self._begins(self._admission.acquire(self._managed, self._timeout_s, self))
            except BaseException:
                self._leave(self._admission.give_back)
                raise
        return self._managed.engine

    def __exit__(self, kind: object = None, error: BaseException | None = None, traceback: object = None) -> None:
        self._leave(self._admission.give_back, error)

    async def __aenter__(self) -> Any:
        if not self._joins():
            try:
                self._begins(await self._admission.acquire_async(self._managed, self._timeout_s, self))
            except BaseException:  # a cancelled task leaves the queue, or releases the model just granted
                self._leave(self._admission.give_back_async)
                raise
        return self._managed.engine

    async def __aexit__(
        self, kind: object = None, error: BaseException | None = None, traceback: object = None
    ) -> None:
        self._leave(self._admission.give_back_async, error)

    def _joins(self) -> bool:
        """Begins the only use; returns whether it shares a current request."""
        if self._entered:
            raise RuntimeError("A lease can be used once; call lease() again.")
        self._entered = True
        if weakref.ref(self) not in _made.get():  # not the context of its creation, nor a copy of it
            self.made_after = ()
            self._made_here = False
        elif self._task is not None and (task := _task()) is not None:
            self._made_here = self._task() is task  # else a sibling of it: another request
        if watch := _watch.get():
            watch(self)
        for outer in held.get():
            # A stream's context is that of its last step, which other work may share in a thread pool.
            if outer.managed is self._managed and not outer.streams and self._admission.share(self, outer):
                return True
        return self.reading and self._admission.join(self, self._managed)

    def _begins(self, request: LeaseRequest) -> None:
        if request.error is not None:
            raise request.error
        request = self.request or request  # another one, if it shares a lease
        self.waited = request.waited
        held.set((*held_requests(), request))
        if self._made_here:
            self._request_here = request

    # Bound now: at the interpreter's end modules are emptied. Then threads can be neither started nor joined.
    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if self.request is not None and not ending():
            self._ended = True
            self._admission.give_back_later(self, self._broken)

    def cancel(self) -> bool:
        """Makes a waiting lease raise `RequestCancelled`. Returns False if it holds the model or has ended."""
        self.cancelled = True
        request = self.request
        return not self._ended if request is None else self._admission.cancel(request)

    @property
    def model(self) -> str:
        return self._managed.name

    @property
    def place(self) -> int | None:
        """The place in the queue: 0 holds the model, 1 is next; None before it is entered and after its end."""
        request = self.request
        return None if request is None else self._admission.place(request)

    @property
    def receipt(self) -> Receipt | None:
        """How long its request, of a shared one that one, waited for the model; None before it is entered."""
        return None if self.waited is None else Receipt.of(self.waited)

    def resumed(self) -> None:
        """For a generator that holds the lease: call this at the start of each step. Records the calling code."""
        if self.request is not None and self.owns:
            self._admission.resumed(self.request)

    def suspended(self) -> None:
        """For a generator that holds the lease: call this before it yields."""
        if self.request is not None and self.owns:
            self.request.site = self.request.site.suspended()

    def discard(self) -> None:
        """Marks the engine as broken: it is released when the lease ends, and the next request loads it anew.

        Device errors that make the engine unusable have the same effect.
        """
        self._broken = True

    def _leave(
        self,
        give_back: Callable[[Lease, bool, BaseException | None], None],
        error: BaseException | None = None,
        ending: Callable[[], bool] = sys.is_finalizing,
    ) -> None:
        self._ended = True
        self._request_here = None
        if ending():
            return
        try:
            give_back(self, self._broken, error)
            held.set(held_requests())
        except BaseException:
            self._admission.wake_monitor()  # it finishes the interrupted change
            raise


def _task() -> asyncio.Task[Any] | None:
    return None if asyncio._get_running_loop() is None else asyncio.current_task()


@contextmanager
def watching(watch: Callable[[Lease], object]) -> Iterator[None]:
    """Calls ``watch`` with each lease entered in this context, before it waits."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)
