"""Measures main memory, and the memory of this process and its children without mapped files. Never raises."""

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

from ..contracts import Device, Memory
from ..observability.outside_memory import MemorySample, OutsideMemory, ProcessMemory
from ..observability.process_memory import heads_claimed_tree, is_claimed, own_bytes, private_bytes


def host_memory() -> Memory:
    """``free_bytes``: available without swapping; ``process_bytes``: resident set of this process."""
    try:
        machine = psutil.virtual_memory()
        return Memory(machine.total, machine.available, psutil.Process().memory_info().rss)
    except (psutil.Error, OSError):
        return Memory()


def sample(device: Device, trim: bool = True, look_at_children: bool = True) -> MemorySample:
    """Measures this process and its children, in main memory and on the device.

    ``trim`` excludes memory cached by the allocator; it takes milliseconds after large frees. ``look_at_children``
    takes 1 to 2 ms, and more for each child.
    """
    if trim:
        with contextlib.suppress(OSError, AttributeError):  # glibc only
            _libc().malloc_trim(0)
    held = _held_by(device)
    own = ProcessMemory(os.getpid(), 0.0, Path(sys.argv[0] or "python").name, own_bytes(), _share(held, os.getpid()))
    return MemorySample(own, _children(device, held) if look_at_children else None, len(sys.modules))


def worker_memory(device: Device, pid: int) -> ProcessMemory | None:
    """Measures a worker process and its descendants together; returns None if it has ended."""
    try:
        worker = psutil.Process(pid)
        tree = [worker, *worker.children(recursive=True)]
        started_s = worker.create_time()
    except (psutil.Error, OSError):
        return None
    sizes = [nbytes for process in tree if (nbytes := private_bytes(process)) is not None]
    device_bytes = device.bytes_of([process.pid for process in tree])
    return ProcessMemory(pid, started_s, "worker process", sum(sizes) if sizes else None, device_bytes)


def remeasured(device: Device, outside: OutsideMemory) -> OutsideMemory:
    """Measures the same processes again, without ended children."""
    held = _held_by(device)
    holders = []
    for holder in outside.holders:
        if holder.pid == os.getpid():
            holders.append(holder)
            continue
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(holder.pid)
            if process.create_time() == holder.started_s and (child := _child(process, device, held)) is not None:
                holders.append(child)
    return replace(outside, holders=tuple(holders))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _held_by(device: Device) -> Mapping[int, int] | None:
    try:
        return device.held_by()
    except Exception:  # a lost device
        return None


def _share(held: Mapping[int, int] | None, pid: int) -> int | None:
    return None if held is None else held.get(pid, 0)


def _children(device: Device, held: Mapping[int, int] | None) -> tuple[ProcessMemory, ...] | None:
    """Returns each live descendant of this process, without claimed trees; None if unknown."""
    try:
        found = psutil.Process().children(recursive=True)
    except (psutil.Error, OSError):
        return None
    children, claimed = [], set()
    for process in found:  # each after its parent
        with contextlib.suppress(psutil.Error, OSError):
            if process.ppid() in claimed or heads_claimed_tree(process):
                claimed.add(process.pid)
            elif (child := _child(process, device, held)) is not None:
                children.append(child)
    return tuple(children)


def _child(process: psutil.Process, device: Device, held: Mapping[int, int] | None) -> ProcessMemory | None:
    try:
        if process.status() == psutil.STATUS_ZOMBIE or is_claimed(process):
            return None
        command = " ".join(process.cmdline())[:80] or process.name()
        started_s = process.create_time()
    except (psutil.Error, OSError):
        return None
    host_bytes = private_bytes(process)
    device_bytes = _share(held, process.pid)
    if host_bytes is not None and device.torch_device == "cpu":
        host_bytes = max(0, host_bytes - (device_bytes or 0))  # a simulated card uses main memory
    return ProcessMemory(process.pid, started_s, command, host_bytes, device_bytes)
