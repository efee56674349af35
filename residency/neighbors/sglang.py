"""SGLang's server. Source: sglang 0.5.23, srt/entrypoints/http_server.py and v1_loads.py, srt/managers/scheduler.py,
tokenizer_manager.py and scheduler_components/weight_updater.py.

- ``GET /v1/loads?include=core`` -> ``{"loads": [{"num_running_reqs", "num_waiting_reqs", ...}]}``, for each rank.
- ``GET /server_info`` -> its settings, among them ``enable_memory_saver``: without ``--enable-memory-saver`` (and the
  package torch-memory-saver) a release frees nothing.
- ``GET /ready`` -> 200, or 503 while it is paused, starts or fails; with ``tokenizer_worker_num`` above 1 each of its
  processes knows only of its own pauses.
- ``POST /pause_generation {"mode": "retract"}``: running requests return to the queue, and new ones wait.
- ``POST /release_memory_occupation {}`` -> 200, empty, when weights, KV cache and CUDA graphs have left. A server that
  is not idle, or that has released already, ends by an assertion: it is paused before, and released once.
- ``POST /resume_memory_occupation {}``, which ends a server that has released nothing, and then
  ``POST /continue_generation {}``.

Not known: how many bytes it frees, and whether it has released. A paused server is not asked, whichever program paused
it; this process remembers the servers that it has asked itself, and only these get the last two calls. After its end
a server stays as it is until another program sends them. It does not come back by itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from ..errors import NeighborRefused
from ..sentences import Sentence
from .contract import Held
from .server import Server

_asked: dict[str, bool] = {}
"""The servers that this process has paused, by their start, and whether they must resume before they continue."""
_lock = threading.Lock()


class SGLang(Server):
    """Must be resumed."""

    kind: ClassVar[str] = "sglang"
    port: ClassVar[int] = 30000
    command: ClassVar[re.Pattern[str]] = re.compile(r"sglang", re.IGNORECASE)
    missing: ClassVar[Sentence] = Sentence("Update SGLang to 0.5.23 or newer", "请将 SGLang 更新到 0.5.23 或更新版本")
    gives_back: ClassVar[bool] = True

    def held(self) -> Held:
        if self._start_if_it_may_release() is None:
            return Held(False, 0)
        return Held(self._read("/v1/loads?include=core", _requests) > 0, None)

    def ask(self) -> None:
        start, saves = self._read("/server_info", _start_and_saver)
        if not saves:
            return
        with self._alone(start):
            if self._start_if_it_may_release() != start:  # another app was first, or it was started anew
                return
            _asked[start] = False
            try:
                self._post("/pause_generation", {"mode": "retract"})
                _asked[start] = True  # also without an answer: it follows when the server has time
                self._post("/release_memory_occupation", {})
            except NeighborRefused:
                _asked[start] = False
                self._continue(start)
                raise

    def give_back(self) -> None:
        start, _ = self._read("/server_info", _start_and_saver)
        with self._alone(start):
            if start not in _asked:  # nor a server that was started anew since
                return
            if _asked[start]:
                _asked[start] = False  # also without an answer: a second one would end it
                try:
                    self._post("/resume_memory_occupation", {})
                except NeighborRefused:
                    _asked[start] = True
                    raise
            self._continue(start)

    def _start_if_it_may_release(self) -> str | None:
        """Returns what differs between two starts of a server; None if it cannot release memory, or is paused."""
        start, saves = self._read("/server_info", _start_and_saver)
        if not saves or (answer := self._get("/ready")).status == 503:
            return None
        return self._parsed("/ready", answer, lambda _: start, text=True)

    def _continue(self, start: str) -> None:
        self._post("/continue_generation", {})
        del _asked[start]

    @contextlib.contextmanager
    def _alone(self, start: str) -> Iterator[None]:
        """Excludes other apps of this user: two that find a server unpaused would make it release twice."""
        digest = hashlib.sha256(start.encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir(), f"sglang-{os.getuid()}-{digest}.lock")
        with _lock, contextlib.ExitStack() as stack:
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                stack.callback(os.close, file)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stack.callback(fcntl.flock, file, fcntl.LOCK_UN)  # a child process may have the file open, too
            except OSError as error:
                raise self._unreachable(_not_alone(path, error)) from error
            yield


def _not_alone(path: Path, error: OSError) -> Sentence:
    return Sentence(
        f"{path} cannot be locked ({error}). Another app of this user is talking to SGLang; try again. If it stays, "
        f"check the file's owner",
        f"无法锁定 {path}（{error}）。本用户的另一个应用正在与 SGLang 通信，请重试。若持续出现，请检查该文件的所有者",
    )


def _start_and_saver(answer: Any) -> tuple[str, bool]:
    """Returns what differs between two starts of a server, and whether it can release memory and tell its pauses."""
    start = json.dumps([answer.get("startup_time"), answer.get("random_seed")])
    return start, bool(answer["enable_memory_saver"]) and answer.get("tokenizer_worker_num", 1) == 1


def _requests(answer: Any) -> int:
    return sum(int(load["num_running_reqs"]) + int(load["num_waiting_reqs"]) for load in answer["loads"])
