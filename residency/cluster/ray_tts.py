"""The interface of the engine, for replicas on Ray Serve: each call goes to the one that is least busy."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
import xxhash
from numpy.typing import NDArray

from ..cancellation import checkpoint, current
from ..engines.builtin import supported_edit_types
from ..engines.step_audio_facts import TARGET_CHARACTERS
from ..engines.text import speakable, spoken_by_step_audio
from ..errors import DeviceLost, ManagerClosed, NotReady, WorkerEnded
from ..remote_errors import rebuilt
from ..web.speech.conversion import Limits
from ..web.speech.task_names import STEP_AUDIO_EDIT_TYPES
from .replica import Answered, Asked

if TYPE_CHECKING:
    import torch
    from ray.serve.handle import DeploymentHandle, DeploymentResponse

logger = logging.getLogger(__name__)

ATTEMPTS = 5
"""Maximum number of replicas that are asked for one call if each ends during it, or its machine or worker fails."""

KEPT_BYTES = 256 << 20
"""Maximum size of the recordings that stay in Ray's object store for further calls."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Pauses between two attempts: each is twice as long as the one before."""


@cache
def _retried() -> Any:
    from ray.util.metrics import Counter

    return Counter("gpu_manager_retried_calls", "Calls that were sent again because a replica has not answered.")


def _cancel(response: DeploymentResponse[Any]) -> None:
    with suppress(Exception):  # of a call that has failed already
        response.cancel()


@contextmanager
def _cancelling(act: Callable[[], object]) -> Iterator[None]:
    """Calls ``act`` if the request in this context is cancelled within the block."""
    if cancellation := current():
        with cancellation.calling(act):
            yield
    else:
        yield


class NoReplica(NotReady):
    """No replica has answered a call."""

    en = "No replica of the engine answered: look at `serve status`, and send the request again."
    zh = "没有引擎副本响应：请查看 `serve status`，然后重新发送请求。"


@dataclass(eq=False, repr=False)
class ReplicasEnded(WorkerEnded):
    """The replicas that a call was sent to have ended during it. ``path``: name of the model."""

    attempts: int = ATTEMPTS
    en = (
        "{self.attempts} replicas of {self.path} have ended during this request: look at their logs (`ray logs`); a "
        "common reason is that main memory was full. Other requests start new replicas."
    )
    zh = (
        "{self.path} 的 {self.attempts} 个副本在处理此请求时退出：请查看其日志（`ray logs`），常见原因是内存不足。"
        "其他请求会启动新的副本。"
    )


class SharedRecordings:
    """Recordings in Ray's object store, so that the calls of a request share one. Thread-safe.

    ``put``: that of Ray. The latest ones stay, up to `KEPT_BYTES`.
    """

    def __init__(self, put: Callable[[NDArray[np.uint8]], Any]) -> None:
        self._put, self._lock = put, threading.Lock()
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def stored(self, path: str) -> Any:
        """Returns the reference of a file's content."""
        content = np.fromfile(path, np.uint8)
        key = xxhash.xxh3_128_hexdigest(content.data)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        reference = self._put(content)
        with self._lock:
            self._kept[key] = reference, len(content)
            while sum(nbytes for _, nbytes in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return reference

    def forget(self) -> None:
        """To be called when a call has failed: their machine may have ended."""
        with self._lock:
            self._kept.clear()


class RayTTS:
    """StepAudioTTS's interface over the replicas of a deployment; see `residency.cluster.replica`. Thread-safe.

    A call whose replica or machine ends before its answer is sent to another one, up to `ATTEMPTS` times: the engine
    keeps nothing between calls.

    Attributes:
        model: its name.
        edit_types: tasks and their sub-tasks.
        target_characters: maximum length of a target text without ``--max-text``.
        at_once: number of calls that may run at a time.
    """

    at_once = 1000

    def __init__(self, replicas: DeploymentHandle[Any], model: str, builtin: bool, timeout_s: float = 900.0) -> None:
        """``model``: one of the deployment. ``timeout_s``: maximum duration of a call, with the start of a replica."""
        import ray

        self.model = model
        self._recordings = SharedRecordings(ray.put)
        self._replicas = replicas.options(multiplexed_model_id=model)
        self._timeout_s = timeout_s
        self.target_characters = Limits.target_text if builtin else TARGET_CHARACTERS
        self.edit_types = supported_edit_types() if builtin else STEP_AUDIO_EDIT_TYPES
        self.check_text: Callable[[str], object] = speakable if builtin else spoken_by_step_audio

    def clone(self, prompt_wav_path: str, prompt_text: str, target_text: str) -> tuple[torch.Tensor, int]:
        return self._ask("clone", prompt_wav_path, prompt_text, target_text)

    def edit(
        self,
        input_audio_path: str,
        audio_text: str,
        edit_type: str,
        edit_info: str | None = None,
        text: str | None = None,
    ) -> tuple[torch.Tensor, int]:
        return self._ask("edit", input_audio_path, audio_text, edit_type, edit_info, text)

    def _ask(self, method: str, path: str, *arguments: Any) -> tuple[torch.Tensor, int]:
        import torch
        from ray.exceptions import ActorDiedError, RayError, RayTaskError
        from ray.serve.exceptions import RayServeException, RequestCancelledError

        asked = Asked(method, os.path.splitext(path)[1], arguments)
        until_s, pause_s, ended = time.monotonic() + self._timeout_s, FIRST_PAUSE_S, 0
        while True:
            checkpoint()
            failure: BaseException
            elsewhere = False
            try:
                answered = self._answer(asked, path, until_s)
            except (RequestCancelledError, RayTaskError):  # of this request, or of the code there
                checkpoint()
                raise
            except (RayError, RayServeException) as error:  # no replica, or its process or machine has ended
                failure = error
                self._recordings.forget()
            else:
                if answered.samples is not None:
                    return torch.from_numpy(answered.samples.copy())[None], answered.sample_rate
                assert answered.error is not None
                failure, elsewhere = rebuilt(answered.error, cloudpickle.loads), answered.elsewhere
                if not elsewhere and not isinstance(failure, DeviceLost | WorkerEnded | ManagerClosed):
                    raise failure
            ended += elsewhere or isinstance(failure, ActorDiedError | DeviceLost | WorkerEnded | ManagerClosed)
            if ended == ATTEMPTS:
                if elsewhere:
                    raise failure
                raise ReplicasEnded(self.model) from failure
            if time.monotonic() + pause_s > until_s:
                raise NoReplica from failure
            logger.warning("A replica has not answered; another one is asked: %s", failure)
            _retried().inc()
            pause = threading.Event()
            with _cancelling(pause.set):
                pause.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _answer(self, asked: Asked, path: str, until_s: float) -> Answered:
        from ray.exceptions import GetTimeoutError

        response = self._replicas.call.remote(asked, self._recordings.stored(path))
        try:
            with _cancelling(partial(_cancel, response)):
                answered: Answered = response.result(timeout_s=max(0.0, until_s - time.monotonic()))
        except (TimeoutError, GetTimeoutError) as error:
            response.cancel()
            raise NoReplica from error
        return answered
