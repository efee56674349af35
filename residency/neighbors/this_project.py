"""Another app of this project, with ``--enable-gpu-management``; see docs/en/http-api.md.

- ``GET /gpu/status`` -> models with ``leases``, ``waiting``, ``state`` and ``device_bytes``.
- ``POST /gpu/offload {"model": NAME}`` -> 200 when the model is in main memory, 202 if it follows a running request.

Both need the control token unless they come from the same machine.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from ..sentences import Sentence
from .contract import Held
from .server import Server


class ThisProject(Server):
    """Restores a model with its next request."""

    kind: ClassVar[str] = "gpu-manager"
    port: ClassVar[int] = 7860
    command: ClassVar[re.Pattern[str]] = re.compile(r"\bapp\.py\b|gpu[-_]manage|tts_gpu_managed|Step-Audio")
    missing: ClassVar[Sentence] = Sentence(
        "Start the app with --enable-gpu-management", "请用 --enable-gpu-management 启动应用"
    )

    def held(self) -> Held:
        return self._read("/gpu/status", _held)

    def ask(self) -> None:
        for name in self.held().models:
            self._post("/gpu/offload", {"model": name})


def _held(answer: Any) -> Held:
    """Counts models on the device, without those that their owner always keeps there."""
    models = answer["models"]
    in_use = [model["leases"] or model["waiting"] or model["state"] == "moving" for model in models.values()]
    there = {
        name: int(model["device_bytes"])
        for name, model in models.items()
        if model["state"] == "gpu" and model["device_bytes"] and model["keep_warm_s"] != -1
    }
    return Held(any(in_use), sum(there.values()), tuple(there))
