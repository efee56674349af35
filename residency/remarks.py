"""Sentences about a model's status that the panel and the command line share. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import Holder
from .sentences import Sentence
from .units import readable_bytes

if TYPE_CHECKING:
    from .status_types import ModelStatus  # not where the launcher runs, before its packages are installed


def holder(model: ModelStatus) -> Sentence | None:
    """Returns which code uses the model, and for how long; None if it is not in use."""
    facts = model.get("holder")  # older apps do not send it
    if not facts:
        return None
    held = Holder(facts["where"], facts["thread"], facts["held_s"], facts.get("waits_for"))
    return Sentence(held.en, held.zh)


def last_error(model: ModelStatus) -> Sentence | None:
    """Returns why the last move failed; None after a success."""
    if not (error := model["last_error"]):
        return None
    reason = Sentence.parsed(error)
    return Sentence(f"Last error: {reason.en}", f"上次错误：{reason.zh}")


def outside(model: ModelStatus) -> Sentence | None:
    """Returns how much memory no move frees, which processes use it, and what to do; None if there is none."""
    processes = model.get("outside_processes")
    if not processes:
        return None
    size = readable_bytes(sum((each["device_bytes"] or 0) + (each["host_bytes"] or 0) for each in processes))
    pids = ", ".join(f"pid {each['pid']} {each['command']}" for each in processes)
    en, zh = "Release the model to free it", "释放模型可以腾出"
    if model["state"] == "released":
        en = "The model was released, but the memory is still in use: end that process"
        zh = "模型已释放，仍在占用：请结束该进程"
    return Sentence(f"{size} outside the accounts ({pids}). {en}", f"账外占用 {size}（{pids}）。{zh}")
