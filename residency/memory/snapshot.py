"""Snapshots: files with released weights, for a reload at the speed of the disk.

A snapshot is a safetensors file (one uint8 tensor called ``mirror``), which other tools can open; here several threads
read it directly into main memory and verify it. Its name contains a digest of its contents, so the same weights are
written only once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import re
import secrets
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import xxhash

from ..errors import InvalidInput, SnapshotUnusable
from ..progress import current
from ..sentences import Sentence
from .checksum import memoryview_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_DATA_ALIGNMENT = 4096
_READ_BYTES = 512 << 10  # small enough to be hashed in the processor's cache
_WRITE_BYTES = 64 << 20  # bytes between two progress reports
_OURS = re.compile(r".+-[0-9a-f]{32}\.safetensors")
_NONE_OF_OURS = {errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EPERM, errno.EACCES}
"""Errors of opening: no file, a link, a socket, a file that `_open` rejects, another user's unreadable file."""
_FORMAT = "gpu-managed-tts"
_Ranges = Sequence[tuple[int, int]]
"""Starts and ends of the parts that have a checksum each, in bytes of the data."""


class SnapshotFolder:
    """A folder of snapshots of at most ``limit_bytes``: beyond that, the least recently used ones are removed.

    Thread-safe for different names. ``raw`` is uint8; each of its ``ranges`` (start, stop) has a checksum (XXH3).
    Several processes may share the folder. Partial files of killed processes are removed. Weights are private: files
    have mode 0600, and a new folder 0700; an existing folder keeps its mode, since it may contain other files. Links,
    pipes and files of other users are neither followed nor waited for, and count as missing.
    """

    def __init__(self, folder: str | Path, limit_bytes: int | None = None) -> None:
        """Creates the folder if needed; raises `InvalidInput` if that fails or it is not writable."""
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        try:
            self.folder.mkdir(0o700, parents=True, exist_ok=True)
            with self._temporary("probe"):
                pass
            self._remove_abandoned()
        except OSError as error:
            raise InvalidInput(
                f"Cannot keep snapshots in {folder} ({error.strerror}): give a folder that can be written to",
                f"无法在 {folder} 中保存快照（{error.strerror}）：请指定可写的目录",
            ) from error

    def write(self, name: str, ranges: _Ranges, checksums: Sequence[int], raw: torch.Tensor) -> None:
        """Stores ``raw``: temporary file, fsync, rename. On failure raises `SnapshotUnusable` and leaves no file."""
        path = self._path(name, ranges, checksums)
        header = _header(len(raw))
        try:
            if not _is_whole(path, header, len(raw)):
                with self._temporary(path.name) as temporary:
                    _write_file(temporary, header, memoryview_of(raw))
                    os.replace(temporary.name, path)
                _fsync(self.folder)
            os.utime(path, follow_symlinks=False)
            self._keep_limit(path)
        except OSError as error:
            raise SnapshotUnusable(name, f"{path}: {error.strerror or error}") from error

    def read(
        self, name: str, ranges: _Ranges, checksums: Sequence[int], raw: torch.Tensor, *, once: bool = False
    ) -> None:
        """Fills ``raw`` from the file and checks every range; raises `SnapshotUnusable`, and removes a damaged file.

        With ``once`` the file is removed afterwards: it will not be written in this form again.
        """
        path = self._path(name, ranges, checksums)
        header = _header(len(raw))
        try:
            if not _is_whole(path, header, len(raw)):
                raise SnapshotUnusable(
                    name,
                    Sentence(f"{path} is missing, cut off, or not one of ours", f"{path} 缺失、不完整或不属于本程序"),
                )
            with contextlib.suppress(OSError):  # a read-only folder works too
                os.utime(path, follow_symlinks=False)
            damaged = _read_ranges(path, len(header), ranges, checksums, memoryview_of(raw))
        except OSError as error:
            raise SnapshotUnusable(name, f"{path}: {error.strerror or error}") from error
        if damaged is not None or once:
            with contextlib.suppress(OSError):
                path.unlink()
        if damaged is not None:
            at = f"{len(header) + damaged:,}"
            raise SnapshotUnusable(
                name,
                Sentence(f"{path} is damaged at byte {at}; it was removed", f"{path} 在第 {at} 字节处损坏，已删除"),
            )

    def _path(self, name: str, ranges: _Ranges, checksums: Sequence[int]) -> Path:
        content = repr((list(ranges), list(checksums)))
        digest = xxhash.xxh3_128_hexdigest(content.encode())
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}-{digest}.safetensors"

    @contextlib.contextmanager
    def _temporary(self, name: str) -> Iterator[BinaryIO]:
        """Creates a file, locked while it is written to distinguish it from one left by a killed process."""
        while True:
            path = self.folder / f".{name}.{secrets.token_hex(4)}.tmp"
            with open(path, "xb", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    if path.exists():  # else another process took it for abandoned before the lock
                        yield file
                        return
                finally:
                    path.unlink(missing_ok=True)

    def _remove_abandoned(self) -> None:
        for path in self.folder.glob(".*.safetensors.*.tmp"):
            with contextlib.suppress(OSError), _open(path) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError while it is being written
                logger.info("Removing %s, left by a process that was killed", path)
                path.unlink(missing_ok=True)

    def _keep_limit(self, newest: Path) -> None:
        if self.limit_bytes is None:
            return
        snapshots = []
        for path in self.folder.iterdir():
            if not _OURS.fullmatch(path.name):
                continue
            with contextlib.suppress(OSError), _open(path) as file:  # OSError: removed meanwhile, or not readable
                if f'"{_FORMAT}"'.encode() in file.read(_DATA_ALIGNMENT):
                    snapshots.append((path, os.fstat(file.fileno())))
        total_bytes = sum(found.st_size for _, found in snapshots)
        for path, found in sorted(snapshots, key=lambda entry: entry[1].st_mtime_ns):
            if total_bytes <= self.limit_bytes:
                return
            if path != newest:
                logger.info("Removing the old snapshot %s", path)
                with contextlib.suppress(OSError):
                    path.unlink()
                total_bytes -= found.st_size


def _header(nbytes: int) -> bytes:
    """Returns a safetensors header, padded with spaces as the format allows: the data begins on a page."""
    entry = {"mirror": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}
    text = json.dumps({"__metadata__": {"format": _FORMAT}, **entry}).encode()
    text += b" " * (-(8 + len(text)) % _DATA_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _open(path: Path) -> BinaryIO:
    """Opens a regular file of this user or root for reading. Raises OSError, without waiting, for anything else."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
            raise PermissionError(errno.EPERM, "Not a regular file of this user", str(path))
        if found.st_mode & 0o077:  # written by an earlier version
            with contextlib.suppress(OSError):
                os.fchmod(handle, 0o600)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _is_whole(path: Path, header: bytes, nbytes: int) -> bool:
    try:
        with _open(path) as file:
            return os.fstat(file.fileno()).st_size == len(header) + nbytes and file.read(len(header)) == header
    except OSError as error:
        if error.errno not in _NONE_OF_OURS:
            raise
        return False


def _write_file(file: BinaryIO, header: bytes, data: memoryview) -> None:
    progress = current()
    progress.enter("writing", len(data))
    _write_all(file, memoryview(header))
    for start in range(0, len(data), _WRITE_BYTES):
        block = data[start : start + _WRITE_BYTES]
        _write_all(file, block)
        progress.advance(len(block))
    os.fsync(file.fileno())


def _write_all(file: BinaryIO, block: memoryview) -> None:
    while block:
        block = block[file.write(block) :]


def _fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_ranges(path: Path, offset: int, ranges: _Ranges, checksums: Sequence[int], target: memoryview) -> int | None:
    """Reads all ranges with a few threads; returns the start of a damaged one, or None."""
    numbers = itertools.count()  # next() is atomic: each range is read by one thread
    damaged: list[int] = []
    errors: list[BaseException] = []
    progress = current()  # not available in other threads
    progress.enter("reading", sum(stop - start for start, stop in ranges))

    def read() -> None:
        while not damaged and not errors and (number := next(numbers)) < len(ranges):
            start, stop = ranges[number]
            try:
                if _read_range(file.fileno(), offset, target[start:stop], start) != checksums[number]:
                    damaged.append(start)
                progress.advance(stop - start)
            except BaseException as error:
                errors.append(error)

    with _open(path) as file:
        _in_threads(read, min(4, max(2, os.cpu_count() or 2)))
    if errors:
        raise errors[0]
    return damaged[0] if damaged else None


def _read_range(handle: int, offset: int, target: memoryview, start: int) -> int:
    """Fills ``target`` from the file; returns the XXH3 of the bytes read (fewer, if the file ends early)."""
    hasher = xxhash.xxh3_64()
    done = 0
    while done < len(target):
        count = os.preadv(handle, [target[done : done + _READ_BYTES]], offset + start + done)
        if not count:
            break
        hasher.update(target[done : done + count])
        done += count
    return hasher.intdigest()


def _in_threads(work: Callable[[], None], count: int) -> None:
    """Runs ``work`` in this thread and in up to ``count - 1`` others at once."""
    threads = []
    with contextlib.suppress(RuntimeError):  # if no thread can be started, run in fewer
        for _ in range(count - 1):
            thread = threading.Thread(target=work, name="snapshot-read")
            thread.start()
            threads.append(thread)
    work()
    for thread in threads:
        thread.join()
