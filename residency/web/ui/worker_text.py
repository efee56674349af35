"""Formats what the status says of worker processes as text. Pure, like `status_text`."""

from __future__ import annotations

from ...status_types import ModelStatus, Status
from ...units import readable_bytes
from ..shared.language import Localize, of_device

CONTEXT = ("上下文与工作区", "Context and workspaces")


def main_memory(status: Status) -> tuple[str, str]:
    """Returns the main memory of all worker processes, in Chinese and English, to be added to that of this process."""
    if status["isolation"] == "none":
        return "", ""
    workers = [model["worker"] for model in status["models"].values() if model["worker"]]
    size = readable_bytes(sum(worker["host_bytes"] or 0 for worker in workers))
    return f"，工作进程 {size}", f", worker processes {size}"


def facts(model: ModelStatus, localize: Localize) -> list[tuple[str, str]]:
    """Returns (label, value) of a model's worker process: its pid, and its memory on the device beyond the model."""
    worker = model["worker"]
    if worker is None:
        return []
    found = [(localize("工作进程", "Worker process"), f"pid {worker['pid']}")]
    if worker["context_bytes"] is not None:
        found.append((localize(*CONTEXT), readable_bytes(worker["context_bytes"])))
    return found


def what_is_left(model: ModelStatus, status: Status, localize: Localize) -> str:
    """Returns what a model that is not on the device has left there; empty without isolation, and while it moves."""
    kind, worker = status["device"]["kind"], model["worker"]
    if status["isolation"] == "none" or kind == "cpu":
        return ""
    if model["state"] == "released":
        words = ("没有工作进程：GPU 上没有它的任何内容。", "It has no worker process: nothing of it is on the GPU.")
    elif model["state"] != "cpu" or worker is None:
        return ""
    elif worker["checkpointed"]:
        words = (
            "驱动已把它的工作进程在 GPU 上的内容移到内存：GPU 上没有它的任何内容。",
            "The driver has moved what its worker process held on the GPU to main memory: nothing of it is on the GPU.",
        )
    elif worker["context_bytes"]:
        size = readable_bytes(worker["context_bytes"])
        words = (
            f"它的工作进程在 GPU 上仍占 {size}（上下文与工作区），释放后归零。",
            f"Its worker process keeps {size} on the GPU (CUDA context and workspaces) until a release.",
        )
    else:
        return ""
    return of_device(words, kind, localize)
