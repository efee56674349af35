"""SGLang's server. Source: sglang 0.5.23, srt/entrypoints/http_server.py and v1_loads.py, srt/managers/scheduler.py and
scheduler_components/weight_updater.py.

- ``GET /v1/loads?include=core`` -> ``{"loads": [{"num_running_reqs", "num_waiting_reqs", ...}]}``, for each rank.
- ``GET /server_info`` -> its settings, among them ``enable_memory_saver``: without ``--enable-memory-saver`` (and the
  package torch-memory-saver) a release frees nothing.
- ``POST /pause_generation {"mode": "retract"}``: running requests return to the queue, and new ones wait.
- ``POST /release_memory_occupation {}`` -> 200, empty, when weights, KV cache and CUDA graphs have left. A server that
  is not idle, or that has released already, ends by an assertion: it is paused before, and released once.
- ``POST /resume_memory_occupation {}``, which ends a server that has released nothing, and then
  ``POST /continue_generation {}``.

Not known: how many bytes it frees, and whether it has released. So this process remembers which servers it has asked;
after its end a server stays as it is until another program sends the last two calls. It does not come back by itself.
"""

from __future__ import annotations

import json
import re
import threading
from typing import Any, ClassVar

from ..errors import NeighborRefused
from ..sentences import Sentence
from .contract import Held
from .server import Server

_released: dict[str, str] = {}
"""The start of each server that this process has made release its memory, by address."""
_lock = threading.Lock()


class SGLang(Server):
    """Must be resumed."""

    kind: ClassVar[str] = "sglang"
    port: ClassVar[int] = 30000
    command: ClassVar[re.Pattern[str]] = re.compile(r"sglang", re.IGNORECASE)
    missing: ClassVar[Sentence] = Sentence("Update SGLang to 0.5.23 or newer", "请将 SGLang 更新到 0.5.23 或更新版本")
    gives_back: ClassVar[bool] = True

    def held(self) -> Held:
        start, saves = self._read("/server_info", _start_and_saver)
        if not saves or _released.get(self.url) == start:
            return Held(False, 0)
        return Held(self._read("/v1/loads?include=core", _requests) > 0, None)

    def ask(self) -> None:
        with _lock:
            start, saves = self._read("/server_info", _start_and_saver)
            if not saves or _released.get(self.url) == start:
                return
            self._post("/pause_generation", {"mode": "retract"})
            _released[self.url] = start  # also without an answer: it follows when the server has time
            try:
                self._post("/release_memory_occupation", {})
            except NeighborRefused:
                del _released[self.url]
                self._post("/continue_generation", {})
                raise

    def give_back(self) -> None:
        with _lock:
            if self.url not in _released:
                return
            start, _ = self._read("/server_info", _start_and_saver)
            if _released[self.url] == start:  # not started anew since
                self._post("/resume_memory_occupation", {})
                self._post("/continue_generation", {})
            del _released[self.url]


def _start_and_saver(answer: Any) -> tuple[str, bool]:
    """Returns what differs between two starts of a server, and whether it can release memory."""
    start = json.dumps([answer.get("startup_time"), answer.get("random_seed")])
    return start, bool(answer["enable_memory_saver"])


def _requests(answer: Any) -> int:
    return sum(int(load["num_running_reqs"]) + int(load["num_waiting_reqs"]) for load in answer["loads"])
