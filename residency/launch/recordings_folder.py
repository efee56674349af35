"""The app's own folder for recordings, deleted at its end and by the next app after a kill."""

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
    """Creates a folder for uploads and results, which Gradio uses too, and deletes it at the end.

    The process locks the folder and marks it. Marked folders without a lock are those of killed apps: they are deleted,
    since they hold voices. Folders without a mark are left alone.
    """
    with ExitStack() as stack:
        try:
            if parent == Settings.tmp_dir and os.path.lexists(parent) and not _is_safe(parent):
                parent += f"-{os.getuid()}"  # the default is another user's here
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
    """Whether it is a folder and no link, writable for this process, whose content other users cannot replace."""
    found = os.lstat(folder)
    exchangeable = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
    ours = found.st_uid in (os.geteuid(), 0) and not exchangeable
    return stat.S_ISDIR(found.st_mode) and ours and os.access(folder, os.W_OK)


@contextmanager
def _locked(folder: str | Path) -> Iterator[None]:
    """Locks a folder; OSError if another process has locked it, or it is another user's, or a link."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(handle).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "Not a folder of this user", str(folder))
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
