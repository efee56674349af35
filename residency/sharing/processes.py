"""The other processes on the card, as the driver and the system name them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import psutil

from ..contracts import Device
from ..sentences import Sentence
from ..status_types import HoldingProcess
from ..units import readable_bytes


def name_of(pid: int) -> str:
    """Returns the name of a process; ``?`` if it cannot be read, as for one in another container."""
    try:
        return psutil.Process(pid).name()
    except (psutil.Error, OSError):
        return "?"


def with_parents(pid: int) -> frozenset[int]:
    """Returns a process and its parents, without process 1; it alone if they cannot be read."""
    try:
        return frozenset((pid, *(parent.pid for parent in psutil.Process(pid).parents() if parent.pid != 1)))
    except (psutil.Error, OSError):
        return frozenset((pid,))


def other_processes(device: Device, own_pids: Collection[int]) -> list[HoldingProcess]:
    """Returns the processes that hold memory of a device, without ``own_pids``."""
    return [
        {"pid": pid, "name": name_of(pid), "bytes": nbytes} for pid, nbytes in device.holders() if pid not in own_pids
    ]


def shortage(needed_bytes: int, free_bytes: int | None, others: Sequence[HoldingProcess]) -> Sentence:
    """Says how much is needed and free, and how much each of the other processes holds.

    ``needed_bytes``: 0 for a first load, which waits only for another first load.
    """
    if needed_bytes == 0:
        return Sentence(
            "another process loads a model of unknown size onto the card", "另一个进程正在向显卡加载大小未知的模型"
        )
    held = [f"{other['name']} ({other['pid']}): {_size(other['bytes'])}" for other in others]
    needed, free = readable_bytes(needed_bytes), _size(free_bytes)
    return Sentence(
        f"the card has {free} free of {needed} needed; {', '.join(held) or 'no other process is known to use it'}",
        f"显卡空闲 {free}，需要 {needed}；{'，'.join(held) or '未发现其他进程占用'}",
    )


def _size(nbytes: int | None) -> str:
    return "?" if nbytes is None else readable_bytes(nbytes)
