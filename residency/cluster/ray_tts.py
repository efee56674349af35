"""The interface of the engine, for replicas on Ray Serve: each call goes to the one that is least busy."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle  # type: ignore[import-untyped]

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
"""Maximum number of replicas that are asked for one call if the device or the worker process of each fails."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Pauses between two attempts: each is twice as long as the one before."""


@cache
def _retried() -> Any:
    from ray.util.metrics import Counter

    return Counter("gpu_manager_retried_calls", "Calls that were sent again because a replica has not answered.")


def _cancel(response: DeploymentResponse[Any]) -> None:
    with suppress(Exception):  # of a call that has failed already
        response.cancel()


class NoReplica(NotReady):
    """No replica has answered a call."""

    en = "No replica of the engine answered: look at `serve status`, and send the request again."
    zh = "没有引擎副本响应：请查看 `serve status`，然后重新发送请求。"


class RayTTS:
    """StepAudioTTS's interface over the replicas of a deployment; see `residency.cluster.replica`. Thread-safe.

    A call whose replica or machine ends before its answer is sent to another one: the engine keeps nothing between
    calls.

    Attributes:
        model: its name.
        edit_types: tasks and their sub-tasks.
        target_characters: maximum length of a target text without ``--max-text``.
        at_once: number of calls that may run at a time.
    """

    at_once = 1000

    def __init__(self, replicas: DeploymentHandle[Any], model: str, builtin: bool, timeout_s: float = 900.0) -> None:
        """``model``: one of the deployment. ``timeout_s``: maximum duration of a call, with the start of a replica."""
        self.model = model
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

        asked = Asked(method, Path(path).read_bytes(), os.path.splitext(path)[1], arguments)
        attempts = ATTEMPTS
        while (answered := self._answer(asked)).samples is None:
            assert answered.error is not None
            error, attempts = rebuilt(answered.error, cloudpickle.loads), attempts - 1
            if not isinstance(error, DeviceLost | WorkerEnded | ManagerClosed) or not attempts:
                raise error
            self._again(error, LONGEST_PAUSE_S)
        return torch.from_numpy(answered.samples.copy())[None], answered.sample_rate

    @staticmethod
    def _again(error: BaseException, pause_s: float) -> None:
        logger.warning("A replica has not answered; another one is asked: %s", error)
        _retried().inc()
        pause = threading.Event()
        if cancellation := current():
            cancellation.on_cancel(pause.set)
        pause.wait(pause_s)

    def _answer(self, asked: Asked) -> Answered:
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError
        from ray.serve.exceptions import RayServeException, RequestCancelledError

        until_s, pause_s = time.monotonic() + self._timeout_s, FIRST_PAUSE_S
        while True:
            checkpoint()
            response = self._replicas.call.remote(asked)
            if cancellation := current():
                cancellation.on_cancel(partial(_cancel, response))
            try:
                answered: Answered = response.result(timeout_s=max(0.0, until_s - time.monotonic()))
                return answered
            except RequestCancelledError:
                checkpoint()
                raise
            except (TimeoutError, GetTimeoutError) as error:
                response.cancel()
                raise NoReplica from error
            except RayTaskError:  # of the code there
                raise
            except (RayError, RayServeException) as error:  # its process or its machine has ended
                if time.monotonic() + pause_s > until_s:
                    raise NoReplica from error
                self._again(error, pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
