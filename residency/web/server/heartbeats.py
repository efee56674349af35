"""Tracks live sessions: those with an open event stream or a recent heartbeat."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

LEFT_FOR_S = 1800.0
"""Timeout of a session without a heartbeat (a sleeping phone, a change of network, a reload)."""
_SILENT_AT_MOST = 1000
"""Maximum of silent sessions; beyond it, the one that was silent longest ends."""
LOST = (
    "服务器上已没有此前的录音和结果：请重新上传录音，填写的文字仍在。",
    "Earlier recordings and results are no longer on the server: upload the recording again; your texts are still "
    "here.",
)
"""Message for a page with an unknown session."""


class Heartbeats:
    """The live sessions. For the thread of the server's loop, except `silent`.

    ``begins`` is called with a session on each heartbeat and new stream. ``ends`` is called in another thread after
    ``timeout_s`` of silence, or when too many sessions are silent; if it returns True, again after the same time.
    """

    def __init__(
        self, begins: Callable[[str], object], ends: Callable[[str], object], timeout_s: float | None = None
    ) -> None:
        self._begins, self._ends = begins, ends
        self._timeout_s = LEFT_FOR_S if timeout_s is None else timeout_s
        self._streams: Counter[str] = Counter()
        self._silent: dict[str, asyncio.TimerHandle] = {}

    def __contains__(self, session: str) -> bool:
        return session in self._streams or session in self._silent

    @contextmanager
    def stream(self, session: str) -> Iterator[None]:
        """Marks an open event stream of the session; a session may have several."""
        self._streams[session] += 1
        self.beat(session)
        try:
            yield
        finally:
            self._streams[session] -= 1
            if self._streams[session]:
                self.beat(session)  # in case the end of this stream was taken for the end of the session
            else:
                del self._streams[session]
                self._wait_for(session)

    def beat(self, session: str) -> None:
        """Records a heartbeat of the session."""
        self._begins(session)
        if session in self._silent:
            self._silent.pop(session).cancel()
        if session not in self._streams:
            self._wait_for(session)

    def silent(self, for_s: float) -> list[str]:
        """Returns the sessions silent for at least ``for_s`` seconds, the longest first. For any thread."""
        before_s = time.monotonic() - for_s  # the clock of event loops
        return [session for session, end in [*self._silent.items()] if end.when() - self._timeout_s <= before_s]

    def _wait_for(self, session: str) -> None:
        loop = asyncio.get_running_loop()
        self._silent[session] = loop.call_later(self._timeout_s, self._end, loop, session)
        if len(self._silent) > _SILENT_AT_MOST:
            longest = next(iter(self._silent))
            self._silent[longest].cancel()
            self._end(loop, longest)

    def _end(self, loop: asyncio.AbstractEventLoop, session: str) -> None:
        del self._silent[session]
        loop.run_in_executor(None, self._ends, session).add_done_callback(partial(self._ended, session))

    def _ended(self, session: str, ended: asyncio.Future[object]) -> None:
        if not ended.cancelled() and ended.result() is True and session not in self:
            self._wait_for(session)
