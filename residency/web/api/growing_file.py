"""A file that a thread writes while a coroutine sends it, so that a slow client delays no model."""

from __future__ import annotations

import asyncio
import io
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

_PIECE_BYTES = 1 << 16
Room = Callable[[], AbstractContextManager[Callable[[float], object]]]
"""Reserves disk space for a block; the block yields a function; call it with the final size."""


class GrowingFile:
    """Bytes from one thread for one coroutine of ``loop``, in a file without a name: nothing is left if the app dies.

    The file exists from the first `write` to `close`; ``room`` reserves its disk space for as long. `write` and `end`
    are called by the thread, `close` by any thread after `end`, all else by the coroutine.
    """

    def __init__(self, folder: str | Path, room: Room, loop: asyncio.AbstractEventLoop) -> None:
        self._folder, self._room, self._loop = Path(folder), room, loop
        self._open = ExitStack()
        self._file: io.FileIO | None = None
        self._size_is_known: Callable[[float], object] = lambda size: None
        self._news = asyncio.Event()
        self._size = self._read = 0
        self._ended = False
        self._error: Exception | None = None

    @property
    def size(self) -> int:
        """Number of bytes written so far."""
        return self._size

    @property
    def complete(self) -> bool:
        """Whether `end` was called without an error."""
        return self._ended and self._error is None

    def write(self, data: bytes) -> None:
        """Appends bytes; raises OSError if the disk is full, and what ``room`` raises."""
        if not data:
            return
        if self._file is None:
            self._size_is_known = self._open.enter_context(self._room())
            self._folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            self._file = self._open.enter_context(file)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) or 0 :]
        self._size += len(data)
        self._notify()

    def end(self, error: Exception | None = None) -> None:
        """Ends the file; the coroutine gets ``error`` after the bytes before it."""
        self._size_is_known(self._size)
        self._error = error
        self._ended = True
        self._notify()

    async def begun(self) -> None:
        """Waits for the first byte, or the end; raises its error if there are no bytes before it."""
        while not self._size and not self._ended:
            self._news.clear()
            await self._news.wait()
        if not self._size and self._error:
            raise self._error

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yields the bytes as they come; raises the error of `end`."""
        while True:
            self._news.clear()
            ended = self._ended
            while self._file and self._read < self._size:
                piece = os.pread(self._file.fileno(), min(_PIECE_BYTES, self._size - self._read), self._read)
                self._read += len(piece)
                yield piece
            if ended:
                break
            await self._news.wait()
        if self._error:
            raise self._error

    def close(self) -> None:
        """Deletes the file. May wait for a lock and the disk: not for the event loop."""
        self._open.close()

    def _notify(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:  # the loop has been closed
            return
