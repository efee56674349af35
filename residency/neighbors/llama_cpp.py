"""llama.cpp's server as a router (started without a model). Source: llama.cpp b11434, tools/server/README.md,
server-models.cpp and server-context.cpp.

- ``GET /models`` -> ``{"data": [{"id", "status": {"value": "loaded"}, ...}]}``; other states are unloaded, loading,
  downloading, and sleeping (``--sleep-idle-seconds``), in which a model holds no memory. A server with one model has no
  ``status`` and cannot unload.
- ``GET /metrics?model=ID&autoload=false``: gauges ``llamacpp:requests_processing`` and ``llamacpp:requests_deferred``,
  only with ``--metrics``; otherwise ``GET /slots?model=ID&autoload=false`` -> ``[{"is_processing": false, ...}]``,
  which restarts the time of ``--sleep-idle-seconds``.
- ``POST /models/unload {"model": ID}`` -> ``{"success": true}`` at once; ends the model's process, with its running
  requests after 10 s (``stop-timeout``). 400 if it is not loaded. While the process ends, the model is listed as
  loaded, and the two calls above answer 500 or 400.

Not known: how many bytes a model holds; and with ``--slots`` only, requests that wait while a slot is free.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar
from urllib.parse import quote

from ..errors import NeighborRefused
from ..sentences import Sentence
from .contract import Held
from .server import Server, gauges


class LlamaCpp(Server):
    """Loads a model again with its next request."""

    kind: ClassVar[str] = "llama.cpp"
    port: ClassVar[int] = 8080
    command: ClassVar[re.Pattern[str]] = re.compile(r"llama[-.]?(server|cpp)|llama serve", re.IGNORECASE)
    missing: ClassVar[Sentence] = Sentence(
        "Start llama-server as a router, without a model, and with --metrics or --slots; update it if it is older",
        "请将 llama-server 作为路由器启动（不指定模型），并启用 --metrics 或 --slots；版本较旧时请更新",
    )

    def held(self) -> Held:
        states = self._states()
        if not states:
            return Held(False, 0)
        in_use = "loading" in states.values() or any(map(self._computes, states))
        return Held(in_use, None, tuple(states))

    def ask(self) -> None:
        for model in self._states():
            try:
                self._post("/models/unload", {"model": model})
            except NeighborRefused:
                if model in self._states():  # it has not left meanwhile
                    raise

    def _states(self) -> dict[str, str]:
        return self._read("/models", _states)

    def _computes(self, model: str) -> bool:
        of_model = f"?model={quote(model, safe='', errors='replace')}&autoload=false"
        answer = self._get(path := f"/metrics{of_model}")
        if answer.status == 501:
            answer = self._get(path := f"/slots{of_model}")
            if answer.ok:
                return self._parsed(path, answer, lambda slots: any(slot["is_processing"] for slot in slots))
        if answer.status in (400, 500, 503):
            return True  # the model's process ends
        return self._parsed(path, answer, lambda text: gauges(text, *_REQUESTS), text=True) != 0


_REQUESTS = ("llamacpp:requests_processing", "llamacpp:requests_deferred")


def _states(answer: Any) -> dict[str, str]:
    """Returns the states of models in memory; raises `LookupError` for a server that is no router."""
    states = {str(model["id"]): str(model["status"]["value"]) for model in answer["data"]}
    return {model: state for model, state in states.items() if state in ("loading", "loaded")}
