"""Requests of pages: at most one per session at a time, with a progress line, until it ends or is stopped."""

from __future__ import annotations

import asyncio
import html
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import gradio as gr
from anyio import CapacityLimiter, to_thread

from ...cancellation import Cancellation
from ...errors import InvalidInput
from ..shared.gradio_compat import localizer
from ..shared.language import Localize
from .chat_history import SessionState, as_messages
from .messages import Message, MessagePlaces
from .waiting import ProgressLine

AT_ONCE = 100
"""Maximum of waiting and running requests. They use threads of their own, so that Gradio's stay free for events."""

READ_EVERY_S = 0.2
"""Interval at which the progress of a request is read."""

T = TypeVar("T")
_threads, _readers = CapacityLimiter(AT_ONCE), CapacityLimiter(4)


class Occupied(InvalidInput):
    """Error of a second request of a session while the first one waits or runs."""

    def __init__(self) -> None:
        super().__init__(
            "Your previous request is still waiting or running, so this one was not sent. Wait for its result, or "
            "press Stop.",
            "您的上一个请求仍在排队或运行，本次未提交。请等待其结果，或点击“停止”。",
        )


class PageRequest:
    """A request: its cancellation, and ``progress``, which returns its progress; for any thread, may block briefly."""

    def __init__(self) -> None:
        self.cancellation = Cancellation()
        self.progress: Callable[[], ProgressLine | None] = lambda: None

    def line(self, progress: ProgressLine | None, localize: Localize) -> str:
        """Returns the progress as HTML; the page shows its Stop button as long as this line exists."""
        sentence, share = progress or (localize("已提交，准备中", "Sent; in preparation"), 0.0)
        if self.cancellation.cancelled:
            sentence, share = localize("正在停止：等待当前步骤结束", "Stopping: waits for the current step to end"), 0.0
        value = f" value='{share:.3f}'" if share else ""
        return f"<label data-running>{html.escape(sentence)}<progress{value}></progress></label>"


class PageRequests:
    """Requests by the state of their session, which survives a page reload. Thread-safe.

    `press` and `follow` are event handlers; they yield values of the chat, the progress line and the messages.
    """

    def __init__(self, places: MessagePlaces) -> None:
        self._places = places
        self._lock = threading.Lock()
        self._requests: dict[int, list[PageRequest]] = {}

    def begin(self, state: SessionState, *, alone: bool = False) -> PageRequest:
        """Starts a request that may change this state until `end`.

        With ``alone``, raises `Occupied` if another one runs that was not stopped.
        """
        request = PageRequest()
        with self._lock:
            others = self._requests.setdefault(id(state), [])
            if alone and not all(other.cancellation.cancelled for other in others):
                raise Occupied
            others.append(request)
        return request

    def end(self, state: SessionState, request: PageRequest) -> None:
        with self._lock:
            others = self._requests[id(state)]
            others.remove(request)
            if not others:
                del self._requests[id(state)]

    def latest(self, state: SessionState) -> PageRequest | None:
        """Returns the newest request that may still change this state, or None."""
        with self._lock:
            return next(reversed(self._requests.get(id(state), ())), None)

    def stop(self, state: SessionState) -> None:
        """Cancels waiting requests, and running ones if the engine can be interrupted; their results are dropped."""
        with self._lock:
            requests = list(self._requests.get(id(state), ()))
        for request in requests:
            request.cancellation.cancel()

    async def press(
        self, answer: Callable[[PageRequest], tuple[Any, SessionState, str]], state: SessionState
    ) -> AsyncIterator[list[Any]]:
        """Starts a request and yields its progress until it ends; refuses it if another of the session runs.

        ``answer`` returns chat, state and message, and ends the request. It continues if the page is closed.
        """
        try:
            request = self.begin(state, alone=True)
        except Occupied as error:
            yield [gr.skip(), gr.skip(), *self._places.values(Message.of(error, localizer()))]
            return
        work = in_thread(lambda: answer(request))
        async for progress in reports(request, work):
            yield [gr.skip(), request.line(progress, localizer()), *self._places.unchanged()]
        chat, _, message = work.result()
        if self.latest(state) is None:
            yield [chat, "", *self._places.values(message)]

    async def follow(self, state: SessionState) -> AsyncIterator[list[Any]]:
        """Yields the progress of the running request to a reloaded page, until the request ends."""
        async for request, progress in _changes(lambda: self.latest(state), lambda: asyncio.sleep(READ_EVERY_S)):
            yield [gr.skip(), request.line(progress, localizer()), *self._places.unchanged()]
        yield [as_messages(state["history_messages"], localizer()), "", *self._places.values(state["message"])]


def in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Starts ``work`` in a thread with the caller's context. It continues if the caller is cancelled."""
    future = asyncio.ensure_future(to_thread.run_sync(work, abandon_on_cancel=True, limiter=_threads))
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


async def reports(request: PageRequest, work: asyncio.Future[Any]) -> AsyncIterator[ProgressLine | None]:
    """Yields the progress of ``request`` whenever it changes, until ``work`` ends."""
    running, pause = lambda: None if work.done() else request, lambda: asyncio.wait({work}, timeout=READ_EVERY_S)
    async for _, progress in _changes(running, pause):
        yield progress


async def _changes(
    running: Callable[[], PageRequest | None], pause: Callable[[], Awaitable[object]]
) -> AsyncIterator[tuple[PageRequest, ProgressLine | None]]:
    shown: object = None
    while request := running():
        progress = await to_thread.run_sync(request.progress, limiter=_readers)
        if (now := (progress, request.cancellation.cancelled)) != shown:
            yield request, progress
            shown = now
        await pause()
