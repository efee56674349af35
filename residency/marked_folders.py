"""Temporary folders with voices, which the next process deletes if theirs is killed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_MARK = ".recordings-of-a-running-app"


@contextmanager
def marked_folder(parent: str, prefix: str) -> Iterator[str]:
    """Creates a folder in ``parent``, which is made, too; deletes it at the end. Raises OSError.

    Locks and marks the folder. Deletes marked folders without a lock whose names begin with ``prefix``: they contain
    voices from killed processes.
    """
    with ExitStack() as stack:
        os.makedirs(parent, mode=0o700, exist_ok=True)
        for mark in Path(parent).glob(f"{prefix}*/{_MARK}"):
            with suppress(OSError), _locked(mark.parent):
                shutil.rmtree(mark.parent)
                logger.info("Removed the recordings of a killed app / 已清理异常退出遗留的目录：%s", mark.parent)
        folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
        stack.enter_context(_locked(folder))
        Path(folder, _MARK).write_text("Recordings of a running app, removed when it ends.\n")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: str | Path) -> Iterator[None]:
    """Locks a folder; raises OSError if it is locked, a link, or another user's."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(handle).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "Not a folder of this user", str(folder))
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
