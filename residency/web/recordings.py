"""Whose recordings lie on the disk: what a browser session has uploaded or been given goes when the session does."""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from pathlib import Path
from threading import Lock

logger = logging.getLogger(__name__)

LEFT_FOR_S = 60.0
"""How long a session may be away, for want of a network or while its page is loaded anew, before it has ended."""

_REMEMBERED = 1000
"""How many sessions that have ended are known to have: their last requests may still be running."""


class Recordings:
    """Files by session. A file that several sessions have (the same upload lies on the disk once) goes with the last.

    Thread-safe. A session of None (a program that names none) owns nothing; its files go with the app. Files lie in
    ``folder``, or in a folder of their own below it.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._lock = Lock()
        self._files: defaultdict[str, set[str]] = defaultdict(set)
        self._ended: deque[str] = deque(maxlen=_REMEMBERED)

    def own(self, session: str | None, *paths: str | None) -> None:
        """These files (None: no file) belong to the session too; if that has ended meanwhile, they go at once."""
        if session is None:
            return
        files = set(filter(None, paths))
        with self._lock:
            if session in self._ended:
                self._delete_locked(files)
            else:
                self._files[session] |= files

    def remove(self, session: str | None, *paths: str) -> None:
        """The session needs these files no more."""
        with self._lock:
            if session is not None:
                self._files[session].difference_update(paths)
            self._delete_locked(set(paths))

    def begin(self, session: str) -> None:
        """The session is there, perhaps again."""
        with self._lock:
            if session in self._ended:
                self._ended.remove(session)

    def end(self, session: str) -> None:
        """The session needs nothing more."""
        with self._lock:
            self._ended.append(session)
            self._delete_locked(self._files.pop(session, set()))

    def _delete_locked(self, paths: set[str]) -> None:
        for path in paths.difference(*self._files.values()):
            file = Path(path)
            try:
                file.unlink()
                if file.parent != self._folder:
                    file.parent.rmdir()
            except OSError:
                logger.debug("%s or its folder stays, or was gone already", path)
