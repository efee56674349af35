"""llama-swap. Source: llama-swap v250 (commit 0bdb3720), internal/server/api.go, apigroup.go and auth.go.

- ``GET /running`` -> ``{"running": [{"model", "state": "ready", ...}]}``: its servers that have not stopped.
- ``GET /api/events``: server-sent events. The first ones are the present state, among them
  ``data:{"type": "inflight", "data": "{\\"requests\\": []}"}``, ``{\\"total\\": 0}`` until v220 (v192 or newer).
- ``POST /api/models/unload`` -> ``{"msg": "ok"}`` when the servers have stopped; cuts their running requests off.

Not known: how many bytes its servers hold.
"""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

from ..sentences import Sentence
from .contract import Held
from .server import Server


class LlamaSwap(Server):
    """Starts a server again with the next request for its model."""

    kind: ClassVar[str] = "llama-swap"
    port: ClassVar[int] = 8080
    command: ClassVar[re.Pattern[str]] = re.compile(r"llama-swap", re.IGNORECASE)
    missing: ClassVar[Sentence] = Sentence(
        "Update llama-swap to v192 or newer", "请将 llama-swap 更新到 v192 或更新版本"
    )

    def held(self) -> Held:
        states = self._read("/running", _states)
        if not states:
            return Held(False, 0)
        starting = "starting" in states.values()
        return Held(starting or self._requests() > 0, None, tuple(states))

    def ask(self) -> None:
        self._post("/api/models/unload")

    def _requests(self) -> int:
        path = "/api/events"
        answer = self._get(path, until=lambda received: re.search(rb'"type":"inflight".*\n', received) is not None)
        return self._parsed(path, answer, _in_flight, text=True)


def _states(answer: Any) -> dict[str, str]:
    states = {str(each["model"]): str(each["state"]) for each in answer["running"]}
    return {model: state for model, state in states.items() if state in ("starting", "ready")}


def _in_flight(text: str) -> int:
    """Returns the requests under way by the last complete event that counts them; raises `LookupError` without one."""
    complete = text[: text.rindex("\n")].splitlines()
    for line in reversed(complete):
        event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
        if event.get("type") == "inflight":
            counted = json.loads(event["data"])
            return int(counted["total"]) if "total" in counted else len(counted["requests"])
    raise LookupError("inflight")
