"""The other processes on the card, as the driver and the system name them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import psutil

from ..contracts import Device
from ..sentences import Sentence
from ..status_types import HoldingProcess
from ..units import readable_bytes


def name_of(pid: int, started: int = 0) -> str:
    """Returns the name of a process; ``?`` if it cannot be read, or is not the one that began at ``started`` (0: any).

    As of one in another container, whose pid may be that of another process here.
    """
    try:
        if started not in (0, _started(pid)):
            return "?"
        return psutil.Process(pid).name()
    except (psutil.Error, OSError):
        return "?"


Identity = tuple[int, int]
"""A process for processes in other containers: its pid as it sees it, and its start in ticks since that of the system.

The start is 0 where unknown, as on other systems than Linux.
"""


def identity_of(pid: int) -> Identity:
    """Returns the identity of a process of this container, which sees the same pid."""
    return pid, _started(pid)


def family_of(pid: int) -> frozenset[Identity]:
    """Returns the identities of a process and its parents without process 1, in each container to which they belong."""
    try:
        chain = [pid, *(parent.pid for parent in psutil.Process(pid).parents() if parent.pid != 1)]
    except (psutil.Error, OSError):
        chain = [pid]
    return frozenset((number, _started(each)) for each in chain for number in _numbers(each))


def _started(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return 0


def _numbers(pid: int) -> list[int]:
    """Returns the pids of a process: here, and in the containers in which it runs."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return [int(number) for number in line.split()[1:]]
    return [pid]


def other_processes(device: Device, own_pids: Collection[int]) -> list[HoldingProcess]:
    """Returns the processes that hold memory of a device, without ``own_pids`` and descendants of this process."""
    me = identity_of(os.getpid())
    return [
        {"pid": pid, "name": name_of(pid), "bytes": nbytes}
        for pid, nbytes in device.holders()
        if pid not in own_pids and me not in family_of(pid)
    ]


def shortage(
    needed_bytes: int, free_bytes: int | None, others: Sequence[HoldingProcess], claimed_bytes: int, earlier: int
) -> Sentence:
    """Says why a move waits for the card: bytes needed and free, and how much each of the other processes holds.

    ``needed_bytes``: 0 for a first load. ``claimed_bytes``: those that other moves still take. ``earlier``: number of
    requests before it in the queue.
    """
    needed, free, claimed = readable_bytes(needed_bytes), _size(free_bytes), readable_bytes(claimed_bytes)
    held = [f"{other['name']} ({other['pid']}): {_size(other['bytes'])}" for other in others]
    if needed_bytes:
        en, zh = [f"the GPU has {free} free, and {needed} are needed"], [f"显卡空闲 {free}，需要 {needed}"]
    else:
        en, zh = ["models of unknown size are loaded one at a time"], ["大小未知的模型逐个加载"]
    if claimed_bytes:
        en.append(f"{claimed} are reserved for models that are being loaded")
        zh.append(f"正在移入的模型将占用其中 {claimed}")
    if earlier:
        en.append(f"before it in the queue for the GPU: {earlier}")
        zh.append(f"在显卡的队列中，前面有 {earlier} 个")
    en.append(", ".join(held) or "no other process is known to use it")
    zh.append("，".join(held) or "未发现其他进程占用")
    return Sentence("; ".join(en), "；".join(zh))


def _size(nbytes: int | None) -> str:
    return "?" if nbytes is None else readable_bytes(nbytes)
