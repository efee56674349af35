"""llama-swap. Source: llama-swap v250 (commit 0bdb3720), internal/server/api.go, apigroup.go and auth.go.

- ``GET /running`` -> ``{"running": [{"model", "state": "ready", ...}]}``: its servers that have not stopped.
- ``GET /api/events``: server-sent events. The first ones are the present state, among them
  ``data:{"type": "inflight", "data": "{\\"operation\\": \\"snapshot\\", \\"requests\\": [...]}"}``. ``requests`` is
  missing if there are none. v192 to v234 have ``{\\"total\\": 0}``, until v217 also while requests run, so this is not
  taken for idle.
- ``POST /api/models/unload`` -> ``{"msg": "ok"}`` when the servers have stopped; running requests are cut off
  after 10 s.

Not known: how many bytes its servers hold.
"""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

from ..errors import InvalidInput
from ..sentences import Sentence
from .contract import Held
from .discovery import started_us
from .server import Server


class LlamaSwap(Server):
    """Starts a server again with the next request for its model."""

    kind: ClassVar[str] = "llama-swap"
    port: ClassVar[int] = 8080
    command: ClassVar[re.Pattern[str]] = re.compile(r"llama-swap", re.IGNORECASE)
    missing: ClassVar[Sentence] = Sentence(
        "Update llama-swap to v235 or newer, which tells what runs",
        "请将 llama-swap 更新到 v235 或更新版本，它能报告运行中的请求",
    )

    def held(self) -> Held:
        states = self._read("/running", _states)
        if not states:
            return Held(False, 0)
        return Held("starting" in states.values() or self._computes(), None, tuple(states))

    def ask(self) -> None:
        if started_us(self.url, self.command):
            raise InvalidInput(
                f"llama-swap at {self.url} is not asked: it has started this app, and would end it. "
                f"Remove it from --gpu-neighbor",
                f"不会请求 {self.url} 的 llama-swap：本应用由它启动，请求它会结束本应用。请从 --gpu-neighbor 中删除它",
            )
        self._post("/api/models/unload")

    def _computes(self) -> bool:
        path = "/api/events"
        answer = self._get(path, until=lambda received: re.search(rb'"type":"inflight".*\n', received) is not None)
        in_flight = self._parsed(path, answer, _in_flight, text=True)
        if in_flight is None:
            raise self._unreachable(self.missing)
        return in_flight


def _states(answer: Any) -> dict[str, str]:
    states = {str(each["model"]): str(each["state"]) for each in answer["running"]}
    return {model: state for model, state in states.items() if state in ("starting", "ready")}


def _in_flight(text: str) -> bool | None:
    """Returns whether requests are under way, by the complete events of a stream; None if they do not tell."""
    told: set[bool] = set()
    for line in text.split("\n")[:-1]:
        event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
        if event.get("type") == "inflight":
            counted = json.loads(event["data"])
            if counted.get("requests") or counted.get("request") or counted.get("total"):
                told.add(True)
            elif "requests" in counted or counted.get("operation") == "snapshot":
                told.add(False)
    return max(told, default=None)
