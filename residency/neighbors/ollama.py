"""Ollama. Source: ollama v0.33.0-rc2 (commit fb307609), server/routes.go and server/sched.go.

- ``GET /api/ps`` -> ``{"models": [{"name", "size", "size_vram", ...}]}``, the loaded models (v0.1.38 or newer).
- ``POST /api/generate {"model": NAME, "keep_alive": 0}`` -> 200 at once; ends the model's process when its running
  requests have ended, and not before (v0.3.11 or newer; older versions load the model first).

Not known: whether a model computes. Ollama does not say, so ``in_use`` is always false; asking interrupts nothing.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from ..sentences import Sentence
from .contract import Held
from .server import Server


class Ollama(Server):
    """Loads a model again with its next request."""

    kind: ClassVar[str] = "ollama"
    port: ClassVar[int] = 11434
    command: ClassVar[re.Pattern[str]] = re.compile(r"ollama", re.IGNORECASE)
    missing: ClassVar[Sentence] = Sentence("Update Ollama to 0.3.11 or newer", "请将 Ollama 更新到 0.3.11 或更新版本")

    def held(self) -> Held:
        models = self._read("/api/ps", _models)
        return Held(False, sum(models.values()), tuple(models))

    def ask(self) -> None:
        for name in self.held().models:
            self._post("/api/generate", {"model": name, "keep_alive": 0})


def _models(answer: Any) -> dict[str, int]:
    """Returns the bytes on the card of each loaded model, without models that are in main memory only."""
    found = {str(model["name"]): int(model["size_vram"]) for model in answer["models"] or ()}
    return {name: nbytes for name, nbytes in found.items() if nbytes > 0}
