"""Stable Diffusion web UI of AUTOMATIC1111, and Forge, both started with ``--api``.

Source: stable-diffusion-webui 1.7 to 1.8 (commit c8a5322d), modules/api/api.py, sd_models.py and shared_state.py;
stable-diffusion-webui-forge (commit dfdcbab6), the same files.

- ``GET /sdapi/v1/progress?skip_current_image=true`` -> ``{"state": {"job", "job_count", ...}, ...}``; ``job_count`` is
  0 when nothing is generated.
- ``GET /sdapi/v1/memory`` -> ``{"cuda": {"reserved": {"current"}, ...}}``, or ``{"cuda": {"error"}}`` without CUDA.
- ``POST /sdapi/v1/unload-checkpoint`` -> ``{}`` when the checkpoint is in main memory.
- ``POST /sdapi/v1/reload-checkpoint`` -> ``{}`` when it is back; does nothing in Forge, which loads by itself.

Not known: requests that wait for the one generation at a time, and bytes that stay (``idle_bytes`` is what torch has
reserved). AUTOMATIC1111 does not load again by itself: an image requested before `give_back` fails.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from ..sentences import Sentence
from .contract import Held
from .server import Server


class StableDiffusionWebUI(Server):
    """Must get its checkpoint back."""

    kind: ClassVar[str] = "sdwebui"
    port: ClassVar[int] = 7860
    command: ClassVar[re.Pattern[str]] = re.compile(
        r"stable-diffusion|sd-?webui|forge|\b(webui|launch)\.py", re.IGNORECASE
    )
    missing: ClassVar[Sentence] = Sentence("Start the web UI with --api", "请用 --api 启动 Web UI")
    gives_back: ClassVar[bool] = True

    def held(self) -> Held:
        in_use = self._read("/sdapi/v1/progress?skip_current_image=true", _generates)
        return Held(in_use, self._read("/sdapi/v1/memory", _reserved_bytes))

    def ask(self) -> None:
        self._post("/sdapi/v1/unload-checkpoint")

    def give_back(self) -> None:
        self._post("/sdapi/v1/reload-checkpoint")


def _generates(answer: Any) -> bool:
    state = answer["state"]
    return bool(state["job"]) or int(state["job_count"]) != 0


def _reserved_bytes(answer: Any) -> int | None:
    cuda = answer["cuda"]
    return None if "error" in cuda else int(cuda["reserved"]["current"])
