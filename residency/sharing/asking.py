"""Asks neighbours for room: other GPU servers on this machine, when a request lacks memory on the card."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..contracts import Device
from ..errors import InvalidInput, ResidencyError
from ..neighbors import Held, Neighbor, find, parse
from ..sentences import Sentence
from ..status_types import NeighborStatus

logger = logging.getLogger(__name__)

AGAIN_AFTER_S = 5.0
"""Time after which a neighbour that was asked, or was in use, is looked at again."""

CLOSED_WITHIN_S = 5.0
"""Wait of `Asking.close` for neighbours that get their memory back, also if its caller has no time left."""

CLOSED_AT_MOST_S = 120.0
"""The same if its caller has no limit: as long as a neighbour may take to answer `ask`, and then `give_back`."""

REPEAT_AFTER_S = 0.25
"""Pause of `Asking.close` before it tries again."""

FREED_WITHIN_S = 3.0
"""Maximum wait for the memory that a neighbour gives up; drivers report it with a delay."""


@dataclass(frozen=True)
class _Known:
    """A neighbour, and what was last heard of it. ``looked_s``, ``asked_s``: of ``time.monotonic``; inf: never."""

    neighbor: Neighbor
    pid: int | None = None
    held: Held | None = None
    looked_s: float = math.inf
    asked_s: float = math.inf
    error: Sentence | None = None


class Asking:
    """The neighbours of this process on one card. Thread-safe; requests to them are sent in threads of their own.

    ``neighbors``: values of ``--gpu-neighbor``; raises `InvalidInput` for one that is none. Those given come first, in
    their order; then those found. Each is asked only if it says that it is not in use, and only while memory lacks.
    """

    def __init__(self, neighbors: tuple[str, ...], device: Device, own_pids: Callable[[], set[int]]) -> None:
        given = [parse(text) for text in neighbors]
        self._finds = None in given
        self._known = {each.url: _Known(each) for each in given if each is not None}
        self._device, self._own_pids = device, own_pids
        self._lock = threading.Lock()
        #: What neighbours gave up that do not load again by themselves, in bytes.
        self._owed: dict[str, int] = {}
        self._gives_back: threading.Thread | None = None
        self._closed = False
        self._talking = threading.Lock()  # one request to a neighbour at a time, so that their order is certain
        self._owner_pid = os.getpid()
        self._found_s = -math.inf
        self._running = False

    def ask(self, needed_bytes: int, is_wanted: Callable[[], bool], ended: Callable[[], object]) -> None:
        """Begins to ask neighbours until so many bytes are free, or no request wants them. Returns at once.

        Does nothing while that is under way. ``ended``: called by the thread when it ends.
        """
        with self._lock:
            if self._running or not (self._known or self._finds):
                return
            self._running = True
        thread = threading.Thread(
            target=self._ask_all, args=(needed_bytes, is_wanted, ended), name="gpu-neighbors", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no more threads: the next call tries again
            self._running = False

    def ask_one(self, url: str) -> None:
        """Asks one neighbour, whether or not memory lacks; waits for its answer.

        Raises `InvalidInput` for an unknown address, or if the neighbour is in use, and the errors of `Neighbor`.
        """
        known = self._known.get(url)
        if known is None:
            raise InvalidInput(f"{url} is no neighbour of this app", f"{url} 不是本应用的邻居服务")
        held = known.neighbor.held()
        self._note(url, held=held, looked_s=time.monotonic())
        if held.in_use:
            raise InvalidInput(f"{known.neighbor.kind} at {url} is in use: it is not asked now",
                               f"{url} 的 {known.neighbor.kind} 正在使用中：现在不会请求它")  # fmt: skip
        if held.idle_bytes != 0:
            self._ask(known.neighbor, held)

    def give_back(self, may: Callable[[], bool] = lambda: True) -> threading.Thread | None:
        """Begins to undo `ask` at the neighbours that do not load again by themselves. Returns the thread, if any.

        ``may``: called before each neighbour; false ends the thread, unless this object is closed. To be repeated while
        it `owes` something: they may not answer, or the system may have no thread left.
        """
        if not self._owed or os.getpid() != self._owner_pid:
            return None
        if self._gives_back is not None and self._gives_back.is_alive():
            return self._gives_back
        thread = threading.Thread(target=self._give_back_all, args=(may,), name="gpu-neighbors", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return None
        self._gives_back = thread
        return thread

    @property
    def owes(self) -> bool:
        """Whether neighbours have given up something that they do not take again by themselves."""
        return bool(self._owed)

    def owed_urls(self) -> set[str]:
        """Returns the addresses of the neighbours that `give_back` lets take their memory again."""
        return set(self._owed)

    def owed_bytes(self) -> int:
        """Returns the bytes that neighbours have given up and `give_back` lets them take again."""
        return sum(list(self._owed.values()))

    def close(self, within_s: float = 0) -> None:
        """Undoes `ask`, also one without an answer yet, and waits for it at most so long. The first call counts.

        Tries again as often as it fails; with infinite ``within_s`` for `CLOSED_AT_MOST_S`. Does nothing in a forked
        child process.
        """
        if os.getpid() != self._owner_pid:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        left_s = CLOSED_AT_MOST_S if within_s == math.inf else max(within_s, CLOSED_WITHIN_S)
        end_s, pause = time.monotonic() + left_s, threading.Event()
        while self._owed:
            if (thread := self.give_back()) is not None:
                thread.join(min(max(left_s, 0), threading.TIMEOUT_MAX))
            if not self._owed or (left_s := end_s - time.monotonic()) <= 0:
                break
            pause.wait(min(REPEAT_AFTER_S, left_s))
        for url in list(self._owed):
            kind = self._known[url].neighbor.kind
            logger.warning("%s at %s has not got its memory back; the guide says how to wake it up / "
                           "%s（%s）尚未收回显存，唤醒方法见指南", kind, url, kind, url)  # fmt: skip

    def status(self) -> list[NeighborStatus]:
        now_s = time.monotonic()
        return [
            {
                "kind": known.neighbor.kind,
                "url": url,
                "pid": known.pid,
                "in_use": None if known.held is None else known.held.in_use,
                "idle_bytes": None if known.held is None else known.held.idle_bytes,
                "models": [] if known.held is None else list(known.held.models),
                "asked_ago_s": None if known.asked_s == math.inf else now_s - known.asked_s,
                "answer": known.error,
            }
            for url, known in list(self._known.items())
        ]

    def _ask_all(self, needed_bytes: int, is_wanted: Callable[[], bool], ended: Callable[[], object]) -> None:
        try:
            if self._finds and time.monotonic() >= self._found_s + AGAIN_AFTER_S:
                self._found_s = time.monotonic()
                self._find()
            for url, known in list(self._known.items()):
                if self._is_free(needed_bytes) or not is_wanted():
                    return
                if known.looked_s == math.inf or time.monotonic() >= known.looked_s + AGAIN_AFTER_S:
                    self._ask_if_idle(url, known, needed_bytes, is_wanted)
        except Exception:
            logger.exception("The neighbours on the card could not be asked")
        finally:
            self._running = False
            ended()

    def _find(self) -> None:
        own = self._own_pids()
        for pid, neighbor in find([pid for pid, _ in self._device.holders() if pid not in own], own):
            self._known.setdefault(neighbor.url, _Known(neighbor, pid))

    def _ask_if_idle(self, url: str, known: _Known, needed_bytes: int, is_wanted: Callable[[], bool]) -> None:
        try:
            held = known.neighbor.held()
            if held.in_use or held.idle_bytes == 0:
                self._note(url, held=held, looked_s=time.monotonic(), error=None)
                return
            self._ask(known.neighbor, held, needed_bytes, is_wanted)
        except Exception as error:
            self._failed(url, error)

    def _ask(
        self, neighbor: Neighbor, held: Held, needed_bytes: int = 0, is_wanted: Callable[[], bool] = lambda: True
    ) -> None:
        """Asks a neighbour, and waits until the memory is free, at most `FREED_WITHIN_S`."""
        url = neighbor.url
        with self._talking:
            wanted, before_bytes = is_wanted(), self._device.memory().free_bytes
            with self._lock:
                if self._closed or not wanted:
                    return
                if neighbor.gives_back:  # before: it may do it although its answer is lost
                    self._owed[url] = held.idle_bytes or 0
            neighbor.ask()
        now_s = time.monotonic()
        self._note(url, held=held, looked_s=now_s, asked_s=now_s, error=None)
        logger.info("%s at %s was asked to give up idle memory / %s（%s）已收到让出空闲显存的请求",
                    neighbor.kind, url, neighbor.kind, url)  # fmt: skip
        if not neighbor.gives_back or held.idle_bytes is not None:
            before_bytes = None  # need not be measured
        awaited_bytes = needed_bytes if before_bytes is None else max(needed_bytes, before_bytes + 1)
        while not self._is_free(awaited_bytes) and time.monotonic() < now_s + FREED_WITHIN_S:
            time.sleep(0.05)
        free_bytes = self._device.memory().free_bytes
        if before_bytes is not None and free_bytes is not None:
            with self._lock:
                if url in self._owed:
                    self._owed[url] = max(0, free_bytes - before_bytes)

    def _give_back_all(self, may: Callable[[], bool]) -> None:
        for url in list(self._owed):
            with self._talking:
                if url not in self._owed:
                    continue  # another thread was first
                if not may() and not self._closed:
                    return
                try:
                    self._known[url].neighbor.give_back()
                except Exception as error:
                    self._failed(url, error)
                    if not isinstance(error.__cause__, ConnectionRefusedError):
                        continue  # tried again later
                with self._lock:  # also of a server that has ended
                    del self._owed[url]

    def _failed(self, url: str, error: Exception) -> None:
        """Notes why a neighbour could not be asked, and logs it, unless that is known."""
        if isinstance(error, ResidencyError):
            said, traceback = Sentence(error.en, error.zh), None
        else:
            said, traceback = Sentence.of(repr(error)), error
        if self._known[url].error != said:
            logger.warning("%s", said, exc_info=traceback)
        self._note(url, looked_s=time.monotonic(), error=said)

    def _note(self, url: str, **changes: object) -> None:
        with self._lock:
            self._known[url] = replace(self._known[url], **changes)  # type: ignore[arg-type]

    def _is_free(self, needed_bytes: int) -> bool:
        free_bytes = self._device.memory().free_bytes
        return free_bytes is None or free_bytes >= needed_bytes
