"""vLLM's OpenAI-compatible server. Source: vLLM 0.32.0, entrypoints/serve/dev/sleep/api_router.py, v1/engine/core.py
and v1/metrics/loggers.py.

- ``GET /is_sleeping`` -> ``{"is_sleeping": false}``; this and the next two exist with ``VLLM_SERVER_DEV_MODE=1``.
- ``POST /sleep?level=1&mode=wait`` -> 200 when asleep: running requests end first, then the weights go to main memory
  and the KV cache is dropped. Without ``mode`` running requests are aborted; older versions ignore it and abort.
- ``POST /wake_up`` -> 200 when awake.
- ``GET /metrics``: gauges ``vllm:num_requests_running`` and ``vllm:num_requests_waiting``, without
  ``--disable-log-stats``. ``GET /load`` counts only with ``--enable-server-load-tracking``, and is 0 otherwise.

Not known: how many bytes a sleep frees, and which program put it to sleep. It does not wake up by itself: requests that
come meanwhile wait for ``/wake_up``, so `give_back` must follow soon.
"""

from __future__ import annotations

import re
from typing import ClassVar

from ..sentences import Sentence
from .contract import Held
from .server import Server, gauges


class VLLM(Server):
    """Must be woken up."""

    kind: ClassVar[str] = "vllm"
    port: ClassVar[int] = 8000
    command: ClassVar[re.Pattern[str]] = re.compile(r"vllm", re.IGNORECASE)
    missing: ClassVar[Sentence] = Sentence(
        "Start vLLM with VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode, on an address that only this machine reaches",
        "请用 VLLM_SERVER_DEV_MODE=1 和 --enable-sleep-mode 启动 vLLM，并只监听本机地址",
    )
    gives_back: ClassVar[bool] = True

    def held(self) -> Held:
        if self._sleeps():
            return Held(False, 0)
        requests = self._read("/metrics", lambda text: gauges(text, *_REQUESTS), text=True)
        return Held(requests != 0, None)  # also without a number

    def ask(self) -> None:
        if not self._sleeps():
            self._post("/sleep?level=1&mode=wait")

    def give_back(self) -> None:
        if self._sleeps():
            self._post("/wake_up")

    def _sleeps(self) -> bool:
        return self._read("/is_sleeping", lambda answer: _boolean(answer["is_sleeping"]))


_REQUESTS = ("vllm:num_requests_running", "vllm:num_requests_waiting")


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(value)
    return value
