"""Whose recordings lie on the disk.

What a session has uploaded or been given goes when the session does; what is nobody's, after a while.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock

logger = logging.getLogger(__name__)

UNOWNED_FOR_S = 3600.0
"""How long files that belong to no session are kept: of programs that name none, and uploads that were not used."""

_IN_USE_FOR_S = 60.0
"""For so long a new file is kept also if the disk space is used up: the request for which it came may be on the way."""

_MOST_FILES = 20_000

_REMEMBERED = 1000
"""How many sessions that have ended, or gone on as others, are known to have: their last requests may still run."""


class Recordings:
    """Files by session. A file that several sessions have (the same upload lies on the disk once) goes with the last.

    Thread-safe. A session of None, or one that has not begun (of a program that names none), owns nothing. Files lie in
    ``folder``, or in a folder of their own below it; directly in it, names that begin with a dot are none of ours.
    Together they may take ``most_bytes``, see `make_room`.
    """

    def __init__(self, folder: str | Path, most_bytes: float = math.inf) -> None:
        self._folder = os.path.realpath(folder)
        self._most_bytes = most_bytes
        self._lock = Lock()
        self._files: defaultdict[str, set[str]] = defaultdict(set)
        self._present: set[str] = set()
        self._heirs: dict[str, str] = {}
        self._ended: deque[str] = deque(maxlen=_REMEMBERED)

    def own(self, session: str | None, *paths: str | None) -> None:
        """These files (None: no file) belong to the session too; if that has ended meanwhile, they go at once."""
        if session is None:
            return
        files = _real(filter(None, paths))
        with self._lock:
            session = self._heirs.get(session, session)
            if session in self._ended:
                self._delete_locked(files)
            elif files:
                self._files[session] |= files

    def owns(self, session: str | None, path: str) -> bool:
        """Whether this file belongs to the session."""
        if session is None:
            return False
        try:
            path = os.path.realpath(path)
        except ValueError:  # no name that a file can have
            return False
        with self._lock:
            return path in self._files.get(self._heirs.get(session, session), ())

    def remove(self, session: str | None, *paths: str) -> None:
        """The session needs these files no more."""
        files = _real(paths)
        with self._lock:
            if (own := self._files.get(self._heirs.get(session, session) if session else "")) is not None:
                own -= files
            self._delete_locked(files)

    def inherit(self, before: str, session: str) -> None:
        """A session goes on as another, which has what the first had, and what is still made for it."""
        with self._lock:
            self._heirs = {who: session if heir == before else heir for who, heir in self._heirs.items()}
            self._heirs[before] = session
            if len(self._heirs) > _REMEMBERED:
                del self._heirs[next(iter(self._heirs))]
            if files := self._files.pop(before, None):
                self._files[session] |= files

    def begin(self, session: str) -> None:
        """The session is there, perhaps again."""
        with self._lock:
            self._present.add(session)
            if session in self._ended:
                self._ended.remove(session)

    def end(self, session: str) -> None:
        """The session needs nothing more."""
        with self._lock:
            self._present.discard(session)
            self._heirs = {who: heir for who, heir in self._heirs.items() if heir != session}
            self._ended.append(session)
            self._delete_locked(self._files.pop(session, set()))

    def sweep(self, now_s: float | None = None) -> None:
        """Delete what has been nobody's for `UNOWNED_FOR_S`; ``now_s`` as of `time.time`."""
        before_s = (time.time() if now_s is None else now_s) - UNOWNED_FOR_S
        with self._lock:
            old = {path for path in self._all() if (state := _state(path)) and state.st_mtime < before_s}
            for absent in self._files.keys() - self._present:
                self._files[absent] -= old
                if not self._files[absent]:
                    del self._files[absent]
            self._delete_locked(old)

    def make_room(self, now_s: float | None = None) -> bool:
        """Whether another file may come; ``now_s`` as of `time.time`.

        If the files take all the space that they may take, the oldest that belong to no session are deleted first.
        """
        before_s = (time.time() if now_s is None else now_s) - _IN_USE_FOR_S
        with self._lock:
            found = {path: state for path in self._all() if (state := _state(path))}
            used_bytes, files = sum(state.st_size for state in found.values()), len(found)
            needless: set[str] = set()
            keep = {path for path in found if self._is_under_way(path)}.union(*self._files.values())
            for path in sorted(found.keys() - keep, key=lambda path: found[path].st_mtime):
                if (used_bytes < self._most_bytes and files < _MOST_FILES) or found[path].st_mtime > before_s:
                    break
                needless.add(path)
                used_bytes, files = used_bytes - found[path].st_size, files - 1
            self._delete_locked(needless)
        return used_bytes < self._most_bytes and files < _MOST_FILES

    def _is_under_way(self, path: str) -> bool:
        """Whether it is a part of an upload that has not ended yet, see `Traffic`."""
        return os.path.dirname(path) == self._folder and os.path.basename(path).startswith("tmp")

    def _all(self) -> Iterator[str]:
        for folder, _, names in os.walk(self._folder):
            ours = folder != self._folder
            yield from (os.path.join(folder, name) for name in names if ours or not name.startswith("."))

    def _delete_locked(self, paths: set[str]) -> None:
        for path in paths.difference(*self._files.values()):
            try:
                os.unlink(path)
                if (folder := os.path.dirname(path)) != self._folder:
                    os.rmdir(folder)
            except OSError:
                logger.debug("%s or its folder stays, or was gone already", path)


def _real(paths: Iterable[str]) -> set[str]:
    """One file by one name, whichever way it was reached."""
    return {os.path.realpath(path) for path in paths}


def _state(path: str) -> os.stat_result | None:
    """Its size and age; None if it has just been deleted."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
