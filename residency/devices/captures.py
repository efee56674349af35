"""CUDA graph captures by other threads, during which many calls of the runtime are forbidden."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def during_captures() -> Iterator[None]:
    """Allows this thread to allocate, free and register memory during a capture by another thread.

    By default such a call fails in both threads. Device-wide synchronization still fails. Has no effect if torch's
    runtime library cannot be loaded.
    """
    cudart = _cudart()
    if cudart is None:
        yield
        return
    mode = ctypes.c_int(2)  # cudaStreamCaptureModeRelaxed: all calls that are possible during captures of others
    cudart.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        cudart.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def is_capturing(index: int) -> bool:
    """Returns whether any thread captures a stream of torch on that card.

    Device-wide synchronization would then fail, and end the capture.
    """
    import torch

    for stream in _streams(index):
        with torch.cuda.stream(stream):
            if torch.cuda.is_current_stream_capturing():
                return True
    return False


@functools.cache
def _streams(index: int) -> frozenset[torch.cuda.Stream]:
    """Returns all streams in torch's pools of that card: 32 of each priority, issued round-robin."""
    import torch

    stream: Any = torch.cuda.Stream
    return frozenset(stream(index, priority=priority) for priority in (0, -1) for _ in range(64))


@functools.cache
def _cudart() -> ctypes.CDLL | None:
    """Returns the CUDA runtime loaded by torch; any other has separate capture modes."""
    import torch

    major = (torch.version.cuda or "").partition(".")[0]
    with contextlib.suppress(OSError, AttributeError):  # linked statically, or not on this system
        library = ctypes.CDLL(f"libcudart.so.{major}", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        if library.cudaThreadExchangeStreamCaptureMode:
            return library
    return None
