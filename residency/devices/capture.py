"""Calls to CUDA while another thread captures a CUDA graph."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_RELAXED = 2
"""``cudaStreamCaptureModeRelaxed``: this thread may do whatever can be done beside the captures of others."""


@contextlib.contextmanager
def during_captures() -> Iterator[None]:
    """A block in which this thread may allocate, free and register memory although another thread captures.

    By default such a call fails in both threads. Calls that no mode permits (to wait for the whole device) fail still.
    Does nothing where the runtime library of torch cannot be reached.
    """
    cudart = _cudart()
    if cudart is None:
        yield
        return
    mode = ctypes.c_int(_RELAXED)
    cudart.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        cudart.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def is_capturing(index: int) -> bool:
    """Whether a stream of torch's is being captured on that card, by whatever thread.

    To wait for the whole card then would fail, and end the capture.
    """
    import torch

    for stream in _streams(index):
        with torch.cuda.stream(stream):
            if torch.cuda.is_current_stream_capturing():
                return True
    return False


@functools.cache
def _streams(index: int) -> frozenset[torch.cuda.Stream]:
    """All of the card's streams that torch gives out: 32 of each priority, in turn."""
    import torch

    stream: Any = torch.cuda.Stream
    return frozenset(stream(index, priority=priority) for priority in (0, -1) for _ in range(64))


@functools.cache
def _cudart() -> ctypes.CDLL | None:
    """The CUDA runtime that torch has loaded; no other, whose modes would be its own."""
    import torch

    major = (torch.version.cuda or "").partition(".")[0]
    with contextlib.suppress(OSError, AttributeError):  # linked statically, or not on this system
        library = ctypes.CDLL(f"libcudart.so.{major}", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        if library.cudaThreadExchangeStreamCaptureMode:
            return library
    return None
