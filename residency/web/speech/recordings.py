"""Tracks which session owns a recording, deletes orphans, and limits the disk space of recordings.

Deletes the files of a session when it ends; files without a session after `UNOWNED_FOR_S`.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from ...errors import ResidencyError

logger = logging.getLogger(__name__)

UNOWNED_FOR_S = 3600.0
"""Retention of files without a session: of programs that send none, and unused uploads."""

IN_USE_FOR_S = 60.0
"""Minimum age of files, and silence of their sessions, before they are deleted to make room."""

CONVERTING = "converting-"
"""Prefix of the folders of current conversions."""

UNDER_WAY = "tmp"
"""Prefix of the files of current uploads, directly in the folder."""

_MOST_FILES = 20_000

_REMEMBERED = 1000
"""Maximum of stored sessions that have ended or were inherited, whose last requests may still run."""


DISK_IS_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Numbers of the OSError."""


class DiskFull(ResidencyError):
    """Error if recordings and results use all their permitted disk space."""

    def __init__(self) -> None:
        super().__init__(
            "The server's limit for recordings is reached: try again later, delete results that are not needed (on "
            "the page: Clear History), or start the app with a larger --max-disk.",
            "服务器保存的录音已达上限：请稍后重试、清空不需要的结果（页面上的“清空历史”），或启动时调大 --max-disk。",
        )


class OutOfDiskSpace(ResidencyError):
    """The file system refuses to write recordings and results: see `DISK_IS_FULL`."""

    en = "The disk of the server's --tmp-dir is full: free space there, or start the app with another --tmp-dir."
    zh = "服务器 --tmp-dir 所在磁盘已满：请清理该磁盘，或启动时用 --tmp-dir 指定其他目录。"


class Recordings:
    """Files by session. A file of several sessions (identical uploads are stored once) is deleted with the last.

    Thread-safe. A session of None owns nothing. Files are in ``folder``, or in a subfolder each; names directly in it
    that begin with a dot are ignored. Their total size is limited to ``most_bytes``, see `reserved`. ``silent`` returns
    the sessions without a connection for so many seconds, the longest silent first.
    """

    def __init__(self, folder: str | Path, most_bytes: float = math.inf) -> None:
        self.folder = os.path.realpath(folder)
        self._most_bytes = most_bytes
        self._reserved_bytes = 0.0
        self.silent: Callable[[float], Sequence[str]] = lambda for_s: ()
        self._lock = Lock()
        self._files: defaultdict[str, set[str]] = defaultdict(set)
        self._present: set[str] = set()
        self._heirs: dict[str, str] = {}
        self._ended: deque[str] = deque(maxlen=_REMEMBERED)

    def own(self, session: str | None, *paths: str | None) -> None:
        """Adds the session as an owner of files (None: no file); deletes them if the session has ended."""
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
        """Whether the session owns the file."""
        if session is None:
            return False
        try:
            path = os.path.realpath(path)
        except ValueError:  # not a valid path
            return False
        with self._lock:
            return path in self._files.get(self._heirs.get(session, session), ())

    def remove(self, session: str | None, *paths: str) -> None:
        """Removes the session as an owner of files; deletes those without owners."""
        files = _real(paths)
        with self._lock:
            if (own := self._files.get(self._heirs.get(session, session) if session else "")) is not None:
                own -= files
            self._delete_locked(files)

    def inherit(self, before: str, session: str) -> None:
        """Transfers the current and future files of the session ``before`` to ``session``."""
        with self._lock:
            self._heirs = {old: session if heir == before else heir for old, heir in self._heirs.items()}
            self._heirs[before] = session
            if len(self._heirs) > _REMEMBERED:
                del self._heirs[next(iter(self._heirs))]
            if files := self._files.pop(before, None):
                self._files[session] |= files

    def begin(self, session: str) -> None:
        """Marks the session as live, also after its end."""
        with self._lock:
            self._present.add(session)
            if session in self._ended:
                self._ended.remove(session)

    def end(self, session: str) -> None:
        """Ends the session; deletes its files."""
        with self._lock:
            self._present.discard(session)
            self._heirs = {old: heir for old, heir in self._heirs.items() if heir != session}
            self._ended.append(session)
            self._delete_locked(self._files.pop(session, set()))

    def sweep(self, now_s: float | None = None) -> None:
        """Deletes files without a live session that are older than `UNOWNED_FOR_S`; ``now_s`` as of `time.time`."""
        before_s = (time.time() if now_s is None else now_s) - UNOWNED_FOR_S
        with self._lock:
            old = {path for path in self._all() if (state := _state(path)) and state.st_mtime < before_s}
            for absent in self._files.keys() - self._present:
                self._files[absent] -= old
                if not self._files[absent]:
                    del self._files[absent]
            self._delete_locked(old)

    @contextmanager
    def reserved(self, most_bytes: float, least_bytes: float | None = None) -> Iterator[float]:
        """Reserves disk space for a file within this block. Yields its bytes: ``most_bytes``, or what is left.

        Raises `DiskFull` if that is less than ``least_bytes`` (by default ``most_bytes``). To make room, first deletes
        files without a session, the oldest first; then files of sessions without a connection, the longest silent
        first. There is no limit per session, since uploads do not name their session.
        """
        least_bytes = most_bytes if least_bytes is None else least_bytes
        with self._lock:
            granted = min(most_bytes, self._make_room_locked(most_bytes, least_bytes))
            if granted < least_bytes:
                raise DiskFull
            self._reserved_bytes += granted
        try:
            yield granted
        finally:
            with self._lock:
                self._reserved_bytes -= granted

    @contextmanager
    def reserved_until_known(self, most_bytes: float) -> Iterator[Callable[[float], None]]:
        """Like `reserved`, for a file of unknown size: yields a function that replaces the estimate by its size."""
        with self.reserved(most_bytes):
            held_bytes = most_bytes

            def known(size_bytes: float) -> None:
                nonlocal held_bytes
                with self._lock:
                    self._reserved_bytes += size_bytes - held_bytes
                    held_bytes = size_bytes

            try:
                yield known
            finally:
                known(most_bytes)

    def _make_room_locked(self, wanted_bytes: float, least_bytes: float) -> float:
        """Deletes files, those of sessions for ``least_bytes`` only. Returns the free bytes, -1 if there are none."""
        if self._most_bytes == math.inf:
            return math.inf
        found = {path: state for path in self._all() if (state := _state(path)) and not self._is_under_way(path)}
        free_bytes = self._most_bytes - self._reserved_bytes - sum(state.st_size for state in found.values())
        before_s = time.time() - IN_USE_FOR_S
        idle = [path for path, state in found.items() if state.st_mtime <= before_s]
        idle.sort(key=lambda path: found[path].st_mtime)
        owned = set[str]().union(*self._files.values())

        def lacks(bytes_: float) -> bool:
            return free_bytes < bytes_ or free_bytes <= 0 or len(found) >= _MOST_FILES

        def delete(paths: set[str]) -> float:
            self._delete_locked(paths)
            return sum(found.pop(path).st_size for path in paths)

        for path in idle:
            if path not in owned and lacks(least_bytes if wanted_bytes == math.inf else wanted_bytes):
                free_bytes += delete({path})
        for session in self.silent(IN_USE_FOR_S):
            if lacks(least_bytes):
                mine = self._files.pop(session, set())
                free_bytes += delete(mine.intersection(found, idle).difference(*self._files.values()))
        return free_bytes if free_bytes > 0 and len(found) < _MOST_FILES else -1.0

    def _is_under_way(self, path: str) -> bool:
        """Whether a file is being written, with reserved bytes."""
        return path[len(self.folder) + 1 :].startswith((UNDER_WAY, CONVERTING))

    def _all(self) -> Iterator[str]:
        for folder, _, names in os.walk(self.folder):
            ours = folder != self.folder
            yield from (os.path.join(folder, name) for name in names if ours or not name.startswith("."))

    def _delete_locked(self, paths: set[str]) -> None:
        for path in paths.difference(*self._files.values()):
            try:
                os.unlink(path)
                if (folder := os.path.dirname(path)) != self.folder:
                    os.rmdir(folder)
            except OSError:
                logger.debug("%s or its folder could not be deleted, or did not exist", path)


def _real(paths: Iterable[str]) -> set[str]:
    return {os.path.realpath(path) for path in paths}


def _state(path: str) -> os.stat_result | None:
    """Returns a file's size and age; None if it was deleted."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
