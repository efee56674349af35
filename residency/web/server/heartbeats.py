"""Tracks live sessions: those with an open event stream or a recent heartbeat."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LEFT_FOR_S = 1800.0
"""How long a session may be silent (a phone asleep, another network, a page loaded anew) before it has ended."""
_SILENT_AT_MOST = 1000
"""How many sessions may be silent at a time: beyond that, the one that has been for longest has ended."""
LOST = (
    "服务器上已没有此前的录音和结果：请重新上传录音，填写的文字仍在。",
    "Earlier recordings and results are gone from the server: upload the recording again; your texts are still here.",
)
"""Message for a page whose session the server does not know."""


class Heartbeats:
    """For the thread of the server's loop, but for `silent`.

    ``begins`` is called with a session whenever it is heard of, ``ends`` (in another thread) when it has been silent
    for `LEFT_FOR_S`, or others want its place.
    """

    def __init__(self, begins: Callable[[str], object], ends: Callable[[str], object]) -> None:
        self._begins, self._ends = begins, ends
        self._lines: Counter[str] = Counter()
        self._silent: dict[str, asyncio.TimerHandle] = {}

    def __contains__(self, session: str) -> bool:
        return session in self._lines or session in self._silent

    @contextmanager
    def line(self, session: str) -> Iterator[None]:
        """In this block the session is there. It may hold several lines."""
        self._lines[session] += 1
        self.heard_of(session)
        try:
            yield
        finally:
            self._lines[session] -= 1
            if self._lines[session]:
                self.heard_of(session)  # whatever has taken the end of this line for its end
            else:
                del self._lines[session]
                self._wait_for(session)

    def heard_of(self, session: str) -> None:
        """The session is there, if only for a moment."""
        self._begins(session)
        if session in self._silent:
            self._silent.pop(session).cancel()
        if session not in self._lines:
            self._wait_for(session)

    def silent(self, for_s: float) -> list[str]:
        """The sessions that have been silent for so many seconds, the longest first. For any thread."""
        before_s = time.monotonic() - for_s  # the clock of event loops
        return [session for session, end in [*self._silent.items()] if end.when() - LEFT_FOR_S <= before_s]

    def _wait_for(self, session: str) -> None:
        loop = asyncio.get_running_loop()
        self._silent[session] = loop.call_later(LEFT_FOR_S, self._end, loop, session)
        if len(self._silent) > _SILENT_AT_MOST:
            longest = next(iter(self._silent))
            self._silent[longest].cancel()
            self._end(loop, longest)

    def _end(self, loop: asyncio.AbstractEventLoop, session: str) -> None:
        del self._silent[session]
        loop.run_in_executor(None, self._ends, session)
