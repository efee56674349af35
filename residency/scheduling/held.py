"""Leases as the queue sees them, and those of this thread of control (thread, or asyncio task: see `contextvars`)."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType

from ..receipts import Waited
from .managed_model import LeaseRequest, ManagedModel

#: The requests of the leases entered in this context; some may have ended: see `held_requests`.
held: contextvars.ContextVar[tuple[LeaseRequest, ...]] = contextvars.ContextVar("held_requests", default=())
#: One list for each load: the model, and nothing after its end.
_loading: contextvars.ContextVar[tuple[list[ManagedModel], ...]] = contextvars.ContextVar("loads", default=())


class LeaseData:
    """The data of a lease.

    Attributes:
        request: its current request; None before it is entered and after its end.
        owns: whether the request was made for this lease; False if it shares another lease's.
        cancelled: `Lease.cancel` was called.
        queued: is called once its own request is in the queue, or has the model; None: nothing.
        reading: whether it only reads values; then it may share any current request.
        keep_warm_s: how long the model stays on the device after its request; None: as its policy says.
        waited: its wait for the model (of a shared request: that one's); None before it is entered.
        made_at: code and line, for a lease that is entered in another thread.
        made_after: current requests whose leases were created in this context before, wherever they were entered.
    """

    request: LeaseRequest | None = None
    owns = False
    cancelled = False
    queued: Callable[[], object] | None = None
    reading = False
    keep_warm_s: float | None = None
    waited: Waited | None = None
    made_at: tuple[CodeType, int]
    made_after: tuple[LeaseRequest, ...] = ()


def held_requests() -> tuple[LeaseRequest, ...]:
    """Returns the current requests of this thread of control (thread, or asyncio task: see `contextvars`)."""
    requests = held.get()
    return tuple([request for request in requests if request.users]) if requests else ()


def held_models() -> tuple[ManagedModel, ...]:
    """Returns the models that this thread of control has leased or is loading."""
    loads = _loading.get()
    return (
        *[request.managed for request in held_requests()],
        *([managed for load in loads for managed in load] if loads else ()),
    )


@contextmanager
def loading(managed: ManagedModel) -> Iterator[None]:
    """Marks this context as loading the model: a lease of it in there would be a deadlock."""
    load = [managed]
    token = _loading.set((*_loading.get(), load))
    try:
        yield
    finally:
        load.clear()  # threads that the loader started with its context may continue
        _loading.reset(token)
