"""ComfyUI. Source: ComfyUI 0.10.0 (commit f443b9f2), server.py, main.py and execution.py.

- ``GET /prompt`` -> ``{"exec_info": {"queue_remaining": 0}}``: running and waiting workflows. ``GET /queue`` has these
  with their whole contents, which can be many megabytes.
- ``GET /system_stats`` -> ``{"system": {"comfyui_version", ...}, "devices": [{"type", "torch_vram_total", ...}]}``;
  ``torch_vram_total`` is what torch's allocator has reserved.
- ``POST /free {"unload_models": true}`` -> 200, empty, at once; a running workflow ends first. The results of nodes
  stay cached in main memory; ``free_memory`` would drop these, too.

Not known: what custom nodes keep on the card beside ComfyUI's own models. ``idle_bytes`` includes it.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from ..sentences import Sentence
from .contract import Held
from .server import Server


class ComfyUI(Server):
    """Loads models again with the next workflow."""

    kind: ClassVar[str] = "comfyui"
    port: ClassVar[int] = 8188
    command: ClassVar[re.Pattern[str]] = re.compile(r"comfy", re.IGNORECASE)
    missing: ClassVar[Sentence] = Sentence("Update ComfyUI", "请更新 ComfyUI")

    def held(self) -> Held:
        remaining = self._read("/prompt", lambda answer: int(answer["exec_info"]["queue_remaining"]))
        return Held(remaining > 0, self._read("/system_stats", _reserved_bytes))

    def ask(self) -> None:
        self._post("/free", {"unload_models": True})


def _reserved_bytes(answer: Any) -> int:
    answer["system"]["os"]
    devices = answer["devices"]
    return sum(int(device["torch_vram_total"]) for device in devices if device["type"] not in ("cpu", "mps"))
