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
        en, zh = [f"the card has {free} free of {needed} needed"], [f"显卡空闲 {free}，需要 {needed}"]
    else:
        en, zh = ["models of unknown size are loaded one at a time"], ["大小未知的模型逐个加载"]
    if claimed_bytes:
        en.append(f"models on their way take {claimed} of it")
        zh.append(f"正在移入的模型将占用其中 {claimed}")
    if earlier:
        en.append(f"requests before this one: {earlier}")
        zh.append(f"前面的请求：{earlier} 个")
    en.append(", ".join(held) or "no other process is known to use it")
    zh.append("，".join(held) or "未发现其他进程占用")
    return Sentence("; ".join(en), "；".join(zh))


def _size(nbytes: int | None) -> str:
    return "?" if nbytes is None else readable_bytes(nbytes)
