"""Requests of pages: at most one per session at a time, until it ends or is stopped."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable
from typing import Any

from ...cancellation import Cancellation
from ...errors import InvalidInput
from ..shared.language import Localize

_SENT = ("已提交，准备中", "Sent; being prepared")
_STOPPING = ("正在停止：等待当前步骤结束", "Stopping: the step that runs comes to its end")


class Occupied(InvalidInput):
    """Error of a second request of a session while the first one waits or runs."""

    def __init__(self) -> None:
        super().__init__(
            "Your request before this one still waits or runs, so this one was not sent: wait for its result, or press "
            "Stop",
            "您的上一个请求仍在排队或运行，本次未提交：请等待其结果，或点击“停止”",
        )


class PageRequest:
    """A request of a page: its progress and its cancellation."""

    def __init__(self) -> None:
        self.cancellation = Cancellation()
        self._told: tuple[str, float] | None = None
        #: Polls the model for progress that events omit. For any thread; may block briefly.
        self.look: Callable[[], None] = lambda: None

    def tell(self, share: float, sentence: str) -> None:
        """Sets the progress: a share from 0 to 1 (0: unknown) and a sentence. Thread-safe."""
        self._told = sentence, share

    def line(self, localize: Localize) -> str:
        """Returns the progress as HTML; the page shows its Stop button as long as this line exists."""
        sentence, share = self._told or (localize(*_SENT), 0.0)
        if self.cancellation.cancelled:
            sentence, share = localize(*_STOPPING), 0.0
        value = f" value='{share:.3f}'" if share else ""
        return f"<label data-running>{html.escape(sentence)}<progress{value}></progress></label>"


class PageRequests:
    """Requests by the state of their session, which survives a page reload. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[int, list[PageRequest]] = {}

    def begin(self, state: dict[str, Any], *, alone: bool = False) -> PageRequest:
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

    def end(self, state: dict[str, Any], request: PageRequest) -> None:
        with self._lock:
            others = self._requests[id(state)]
            others.remove(request)
            if not others:
                del self._requests[id(state)]

    def latest(self, state: dict[str, Any]) -> PageRequest | None:
        """Returns the newest request that may still change this state, or None."""
        with self._lock:
            return next(reversed(self._requests.get(id(state), ())), None)

    def stop(self, state: dict[str, Any]) -> None:
        """Cancels waiting requests, and running ones if the engine can be interrupted; their results are dropped."""
        with self._lock:
            requests = list(self._requests.get(id(state), ()))
        for request in requests:
            request.cancellation.cancel()
