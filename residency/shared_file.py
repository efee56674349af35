"""Anonymous shared memory (memfd), which exists while a process has its descriptor or maps it. Linux only."""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref


class SharedFile:
    """Owns the descriptor of shared memory, and closes it at the end of its life. Pickled frames carry it along."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        _open.add(self)

    @classmethod
    def create(cls, nbytes: int) -> SharedFile:
        """Returns zeroed memory of ``nbytes`` > 0. Raises OSError if the system has no room for it."""
        file = cls(os.memfd_create("gpu-worker-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.posix_fallocate(file.fd, 0, nbytes)  # all at once: faster than page by page, and fails here, not at a write
        return file

    def seal(self) -> None:
        """Forbids all writes from now on. Raises OSError while a process could still write."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)

    def mapped(self, shared: bool) -> mmap.mmap:
        """Maps all of it; writes go to a copy of the page unless ``shared``."""
        return mmap.mmap(self.fd, 0, mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = close


_open: weakref.WeakSet[SharedFile] = weakref.WeakSet()


def _close_all() -> None:
    """In a forked child, which would keep the memory after its release here."""
    for file in list(_open):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)
