"""The app's folder for recordings; deleted at its end, or by the next app after a kill."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import InvalidInput
from .settings import Settings
from .signals import Signals

logger = logging.getLogger(__name__)

_MARK = ".recordings-of-a-running-app"


@contextmanager
def recordings_folder(parent: str, signals: Signals) -> Iterator[str]:
    """Creates a folder for uploads and results, also for Gradio; deletes it at the end.

    Locks and marks the folder. Deletes marked folders without a lock: they contain voices from killed apps.
    """
    with ExitStack() as stack:
        try:
            if parent == Settings.tmp_dir and os.path.lexists(parent) and not _is_safe(parent):
                parent += f"-{os.getuid()}"  # the default belongs to another user
                if os.path.lexists(parent) and not _is_safe(parent):
                    raise PermissionError(errno.EPERM, "another user made it", parent)
            os.makedirs(parent, mode=0o700, exist_ok=True)
            for mark in Path(parent).glob(f"editx-*/{_MARK}"):
                with suppress(OSError), _locked(mark.parent):
                    shutil.rmtree(mark.parent)
                    logger.info("Removed what a killed app had left / 已清理异常退出遗留的目录：%s", mark.parent)
            folder = tempfile.mkdtemp(prefix="editx-", dir=parent)
            stack.enter_context(_locked(folder))
            Path(folder, _MARK).write_text("Recordings of a running app, removed when it ends.\n")
        except OSError as error:
            raise InvalidInput(
                f"Cannot write to --tmp-dir {parent} ({error.strerror}): give another folder",
                f"无法写入 --tmp-dir {parent}（{error.strerror}）：请换一个目录",
            ) from error
        os.environ["GRADIO_TEMP_DIR"] = folder
        signals.at_once(lambda: shutil.rmtree(folder, ignore_errors=True))
        try:
            yield folder
        finally:
            signals.interrupt_no_more()
            shutil.rmtree(folder, ignore_errors=True)


def _is_safe(folder: str) -> bool:
    """Returns whether it is a folder, no link, writable, and with content that other users cannot replace."""
    found = os.lstat(folder)
    exchangeable = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
    ours = found.st_uid in (os.geteuid(), 0) and not exchangeable
    return stat.S_ISDIR(found.st_mode) and ours and os.access(folder, os.W_OK)


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
