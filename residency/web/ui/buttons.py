"""Handlers of the request buttons, and the progress line of a request."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import gradio as gr
from anyio import CapacityLimiter, to_thread

from ...cancellation import Cancellation
from ..shared.gradio_compat import localizer
from .chat_history import State, as_messages
from .messages import Message, MessagePlaces
from .page_requests import Occupied, PageRequest, PageRequests

AT_ONCE = 100
"""Maximum of waiting and running requests. They use threads of their own, so that Gradio's stay free for events."""

LOOK_EVERY_S, _LOOK_AT_MODEL_EVERY_S = 0.1, 0.5

T = TypeVar("T")
_threads, _lookers = CapacityLimiter(AT_ONCE), CapacityLimiter(4)


class Buttons:
    """Handlers for the buttons of the page. They yield values of the chat, the progress line and the messages."""

    def __init__(self, requests: PageRequests, places: MessagePlaces) -> None:
        self._requests = requests
        self._places = places

    async def press(
        self, answer: Callable[[PageRequest], tuple[Any, State, str]], state: State
    ) -> AsyncIterator[list[Any]]:
        """Starts a request and yields its progress until it ends; refuses it if another of the session runs.

        ``answer`` returns chat, state and message, and ends the request. It continues if the page is closed.
        """
        try:
            request = self._requests.begin(state, alone=True)
        except Occupied as error:
            yield [gr.skip(), gr.skip(), *self._places.values(Message.of(error, localizer()))]
            return
        work = asyncio.ensure_future(in_thread(lambda: answer(request)))
        async for line in lines(
            lambda: None if work.done() else request, lambda: asyncio.wait({work}, timeout=LOOK_EVERY_S)
        ):
            yield [gr.skip(), line, *self._places.unchanged()]
        chat, _, message = work.result()
        if self._requests.latest(state) is None:
            yield [chat, "", *self._places.values(message)]

    async def follow(self, state: State) -> AsyncIterator[list[Any]]:
        """Yields the progress of the running request to a reloaded page, until the request ends."""
        async for line in lines(lambda: self._requests.latest(state), lambda: asyncio.sleep(LOOK_EVERY_S)):
            yield [gr.skip(), line, *self._places.unchanged()]
        yield [as_messages(state["history_messages"], localizer()), "", *self._places.values(state["message"])]


async def lines(
    under_way: Callable[[], PageRequest | None], pause: Callable[[], Awaitable[object]]
) -> AsyncIterator[str]:
    """Yields the progress line of the running request whenever it changes, until no request runs."""
    shown, looked_s = "", -math.inf
    while request := under_way():
        if time.monotonic() - looked_s >= _LOOK_AT_MODEL_EVERY_S:
            await to_thread.run_sync(request.look, limiter=_lookers)
            looked_s = time.monotonic()
        if (line := request.line(localizer())) != shown:
            yield line
            shown = line
        await pause()


async def in_thread(work: Callable[[], T], cancellation: Cancellation | None = None) -> T:
    """Runs ``work`` in a thread with the caller's context; returns its result.

    If the caller's task is cancelled, cancels ``cancellation``; ``work`` continues until it checks that.
    """
    try:
        return await to_thread.run_sync(work, abandon_on_cancel=True, limiter=_threads)
    except asyncio.CancelledError:
        if cancellation:
            cancellation.cancel()
        raise
