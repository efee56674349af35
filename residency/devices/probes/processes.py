"""Measures the memory of this process and its children, without mapped files."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil

from ...contracts import Device
from ...observability.outside_memory import MemorySample, OutsideMemory, ProcessMemory
from ...observability.process_memory import child_of, children, own_bytes


def sample(device: Device, trim: bool = True, look_at_children: bool = True) -> MemorySample:
    """Measures this process and its children, in main memory and on the device. Never raises.

    ``trim`` excludes memory cached by the allocator; it takes milliseconds after large frees. ``look_at_children``
    takes 1 to 2 ms, and more for each child.
    """
    if trim:
        _trim()
    held = _held_by(device)
    found = children() if look_at_children else None

    def holder(pid: int, started_s: float, command: str, host_bytes: int | None) -> ProcessMemory:
        return _holder(device, held, pid, started_s, command, host_bytes)

    own = holder(os.getpid(), 0.0, Path(sys.argv[0] or "python").name, own_bytes())
    return MemorySample(own, None if found is None else tuple(holder(*child) for child in found), len(sys.modules))


def _trim() -> None:
    """Returns the allocator's cached memory to the system (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        _libc().malloc_trim(0)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def remeasured(outside: OutsideMemory, device: Device) -> OutsideMemory:
    """Measures the same processes again, without ended children. Never raises."""
    held = _held_by(device)
    holders = []
    for holder in outside.holders:
        if holder.pid == os.getpid():
            holders.append(holder)
            continue
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(holder.pid)
            if process.create_time() == holder.started_s and (child := child_of(process)) is not None:
                holders.append(_holder(device, held, *child))
    return replace(outside, holders=tuple(holders))


def _held_by(device: Device) -> Mapping[int, int] | None:
    try:
        return device.held_by()
    except Exception:  # a lost device
        return None


def _holder(
    device: Device, held: Mapping[int, int] | None, pid: int, started_s: float, command: str, host_bytes: int | None
) -> ProcessMemory:
    device_bytes = None if held is None else held.get(pid, 0)
    if host_bytes is not None and device.torch_device == "cpu" and pid != os.getpid():
        host_bytes = max(0, host_bytes - (device_bytes or 0))  # a simulated card uses main memory
    return ProcessMemory(pid, started_s, command, host_bytes, device_bytes)
