"""Processes speech requests of the page and the API: validation, engine call, WAV file. Independent of Gradio."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ...cancellation import checkpoint
from ...contracts import Engine
from ...errors import Field, InvalidInput, ManagerClosed, RequestCancelled, ResidencyError, about
from ...observability.error_classification import message_of
from ...sentences import Sentence, without_surrogates
from ..shared.language import en, zh
from .conversion import Conversion, Limits
from .queue import SpeechQueue
from .recordings import DISK_IS_FULL, OutOfDiskSpace, Recordings
from .task_names import choices

logger = logging.getLogger(__name__)

_NO_PROMPT = Sentence("Prompt Text is empty: write the words of the recording", "提示文本为空：请填写录音中的内容")
_NO_TARGET = Sentence("Target Text is empty: write what should be spoken", "目标文本为空：请填写要合成的内容")
_NO_TAGS = Sentence(
    "Target Text is empty: write the words of the recording, with tags such as [Laughter]",
    "目标文本为空：请填写录音中的内容，并加入 [Laughter] 等标签",
)


RECOGNIZER = "asr"
"""Name of the speech recognition as a model of a manager, or of its own queue."""


class ShuttingDown(ResidencyError):
    """Error of new requests during the shutdown of the app."""

    def __init__(self) -> None:
        super().__init__(
            "The app is shutting down and takes no new requests; try again once it is back.",
            "应用正在关闭，不再接受新请求；请在其恢复后重试。",
        )


class EditFailed(ResidencyError):
    """Error of `SpeechService.clone_and_edit` if only its edit fails; ``clone`` is the file of the clone."""

    def __init__(self, clone: str, error: Exception) -> None:
        reason = explain(error, has_history=False)
        super().__init__(
            f"The clone succeeded and is kept; its edit did not: {reason.en}",
            f"克隆已完成并保留，但编辑未完成：{reason.zh}",
            clone,
            error,
        )
        self.clone = clone


class SpeechService:
    """Speech requests to an engine; results are paths of 16-bit WAV files. Thread-safe if the engine is.

    Recordings are paths that `Conversion.readable` (of ``incoming``) returned, which checks them.
    """

    def __init__(
        self,
        engine: Engine | None,
        edit_types: Mapping[str, Sequence[str]],
        recordings: Recordings,
        recognize: Callable[[str], str] | None = None,
        limits: Limits | None = None,
        queue: SpeechQueue | None = None,
    ) -> None:
        """``recognize`` transcribes a recording. ``queue`` is that of an engine without a manager.

        With ``queue``, ``recognize`` has no manager either, and transcribes one recording at a time.
        """
        self.engine = engine
        self._recognize = recognize
        self.edit_types = edit_types
        self.folder = Path(recordings.folder)
        self._recordings = recordings
        self.limits = limits or Limits()
        self._queue = queue
        self._recognizer_queue = SpeechQueue(RECOGNIZER) if queue else None
        self.incoming = Conversion(recordings, self.limits)
        self._changed = threading.Condition()
        self._closed = False
        self._running = 0

    @property
    def transcribes(self) -> bool:
        return self._recognize is not None

    @property
    def running(self) -> int:
        """Number of requests that use the engine, or wait for it."""
        return self._running

    def close(self) -> None:
        """Refuses new requests (`ShuttingDown`); running ones may finish."""
        self._closed = True
        for queue in filter(None, (self._queue, self._recognizer_queue)):
            queue.close()

    def wait_until_idle(self, within_s: float) -> bool:
        """Waits for running requests; returns False after ``within_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, min(within_s, threading.TIMEOUT_MAX))

    def clone(self, recording: str, prompt_text: str | None, target_text: str | None) -> str:
        """Speaks ``target_text`` in the voice of the recording. Raises `InvalidInput`, and errors of the engine."""
        prompt, target = self._checked_clone(recording, prompt_text, target_text)
        with self.engine_at_work() as engine:
            return self._write("clone", engine.clone(recording, prompt, target))

    def clone_and_edit(
        self,
        recording: str,
        prompt_text: str | None,
        target_text: str | None,
        edit_type: str | None,
        edit_info: str | None,
    ) -> tuple[str, str]:
        """Clones, and edits the result without giving up the model between; returns both files.

        Raises the errors of `clone` and `edit`: `EditFailed` from one of the edit, after the clone.
        """
        task, info = self.checked_task(edit_type, edit_info)
        prompt, target = self._checked_clone(recording, prompt_text, target_text)
        with self.engine_held() as engine:
            clone = self._write("clone", engine.clone(recording, prompt, target))
            try:
                checkpoint()
                return clone, self._write(task, engine.edit(clone, target, task, info, target))
            except Exception as error:
                raise EditFailed(clone, error) from error

    def edit(
        self,
        recording: str,
        audio_text: str | None,
        edit_type: str | None,
        edit_info: str | None,
        text: str | None,
    ) -> tuple[str, str]:
        """Edits a recording; returns the file and its new text. Raises `InvalidInput`, and errors of the engine."""
        task, info, spoken, wanted = self.checked_edit(audio_text, edit_type, edit_info, text)
        with self.engine_at_work() as engine:
            check(engine, "check_audio", recording, "recording")
            return self._write(task, engine.edit(recording, spoken, task, info, wanted)), wanted

    def checked_edit(
        self, audio_text: str | None, edit_type: str | None, edit_info: str | None, text: str | None
    ) -> tuple[str, str | None, str, str]:
        """Returns task, sub-task, the words of the recording and those of the result; raises `InvalidInput`."""
        task, info = self.checked_task(edit_type, edit_info)
        spoken = self.checked_text("prompt_text", audio_text)
        # Only paralinguistic changes the text: its target text is the old one with tags such as [Laughter].
        if task != "paralinguistic":
            return task, info, spoken, spoken
        wanted = self.checked_text("target_text", text, _NO_TAGS)
        check(self.engine, "check_text", wanted, "target_text")
        return task, info, spoken, wanted

    def transcribe(self, recording: str) -> str:
        """Returns the transcript of a recording. Raises `InvalidInput`, and errors of the recognizer."""
        recognize = self.recognizer()
        with self._at_work(), self._recognizer_queue.reserved() if self._recognizer_queue else nullcontext():
            return recognize(recording).strip()

    def recognizer(self) -> Callable[[str], str]:
        """Returns the recognizer; raises `InvalidInput` without one."""
        if self._recognize is None:
            raise InvalidInput(
                "Recordings are not transcribed: start the app with --enable-auto-transcribe",
                "未启用自动转写：启动时请加上 --enable-auto-transcribe",
            )
        return self._recognize

    def _checked_clone(self, recording: str, prompt_text: str | None, target_text: str | None) -> tuple[str, str]:
        prompt = self.checked_prompt(prompt_text)
        target = self.checked_text("target_text", target_text, _NO_TARGET)
        check(self.engine, "check_text", target, "target_text")
        check(self.engine, "check_audio", recording, "recording")
        return prompt, target

    def checked_prompt(self, text: str | None) -> str:
        """Returns the words of a recording without spaces at their ends; raises `InvalidInput`."""
        return self.checked_text("prompt_text", text, _NO_PROMPT)

    def checked_task(self, edit_type: str | None, edit_info: str | None) -> tuple[str, str | None]:
        """Returns the task, and its sub-task if it has any; raises `InvalidInput`."""
        if not edit_type or edit_type == "clone":
            tasks = _names([name for name in self.edit_types if name != "clone"])
            raise InvalidInput(
                f"EDIT needs a task, and clone is not an edit: choose one of {tasks.en}",
                f"EDIT 需要编辑任务（“克隆音色”不是编辑）：请选择 {tasks.zh}",
                "task",
            )
        # The engine accepts or rejects tasks that are not listed.
        offered = self.edit_types.get(edit_type, [])
        if offered and edit_info not in offered:
            task, sub_tasks = _names([edit_type]), _names(offered, edit_type)
            raise InvalidInput(
                f"The task {task.en} {f'has no sub-task {edit_info!r:.40}' if edit_info else 'needs a sub-task'}: "
                f"choose one of {sub_tasks.en}",
                f"任务 {task.zh} {f'没有子任务 {edit_info!r:.40}' if edit_info else '需要子任务'}："
                f"请选择 {sub_tasks.zh}",
                "sub_task",
            )
        return edit_type, edit_info if offered else None

    def checked_text(
        self, field: Field, text: str | None, missing: Sentence | None = None, limit: int | None = None
    ) -> str:
        """Returns the text without spaces at its ends, and U+FFFD in place of lone surrogates.

        Raises `InvalidInput` if it is ``missing``, or too long.
        """
        text = without_surrogates(text or "").strip()
        limit = limit or (self.limits.target_text if field == "target_text" else self.limits.text)
        if missing and not text:
            raise InvalidInput(missing.en, missing.zh, field)
        if len(text) > limit:
            raise InvalidInput(
                f"The text has {len(text)} characters, more than {limit}: shorten it, or start the app with a larger "
                f"--max-text",
                f"文本有 {len(text)} 个字符，超过 {limit}：请缩短，或启动时调大 --max-text",
                field,
            )
        return text

    @contextmanager
    def engine_at_work(self) -> Iterator[Engine]:
        """Counts a request within this block, and reserves an engine without a manager for it; yields the engine.

        Raises `ShuttingDown`, `DiskFull`, `RequestCancelled`, and `InvalidInput` without an engine.
        """
        if self.engine is None:
            raise InvalidInput("No engine is loaded: start the app with app.py", "没有加载引擎：请用 app.py 启动")
        with self._at_work(), self._recordings.reserved(0), self._queue.reserved() if self._queue else nullcontext():
            yield self.engine

    @contextmanager
    def engine_held(self, keep_warm_s: float | None = None) -> Iterator[Engine]:
        """Like `engine_at_work`, with one lease for all calls in this block if the engine has a manager.

        ``keep_warm_s``: seconds that the model stays on the device afterwards; None: as configured.
        """
        with self.engine_at_work() as engine:
            managed: Any = engine if hasattr(type(engine), "lease") else None
            with managed.lease(keep_warm=keep_warm_s) if managed else nullcontext():
                yield engine

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        with self._changed:
            if self._closed:
                raise ShuttingDown
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _write(self, kind: str, answer: tuple[Any, int]) -> str:
        checkpoint()  # for engines without checkpoints
        audio, sample_rate = answer
        samples = np.asarray(audio, dtype=np.float32).reshape(-1)
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=f"{kind}-", suffix=".wav", dir=self.folder)
        os.close(handle)
        try:
            soundfile.write(path, samples, sample_rate, subtype="PCM_16")
        except BaseException:
            os.unlink(path)
            raise
        return path


def check(engine: Engine | None, name: str, value: str, field: Field) -> None:
    """Calls a check of the engine, if it has one, so that its `InvalidInput` is about ``field``."""
    if check := getattr(engine, name, None):
        with about(field):
            check(value)


def explain(error: Exception, *, has_history: bool = True) -> Sentence:
    """Returns an error as a sentence for users. Logs a traceback if the user did not cause it."""
    if isinstance(error, ManagerClosed):
        error = ShuttingDown()
    if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
        error = OutOfDiskSpace()
    if isinstance(error, RequestCancelled):  # after a lost connection
        return Sentence(
            "The connection was lost, so the waiting request was cancelled. Submit it again.",
            "连接中断，排队中的请求已被取消。请重新提交。",
        )
    if isinstance(error, ResidencyError):
        return message_of(error)
    # StepAudioTTS raises its own HTTPException, with the reason in `detail` but not in str().
    reason = getattr(error, "detail", None) or str(error) or type(error).__name__
    if 400 <= getattr(error, "status_code", 500) < 500:
        return Sentence(f"The engine cannot do this: {reason}", f"引擎无法处理该请求：{reason}")
    logger.error("request failed", exc_info=error)
    unchanged = ("Your history is unchanged; try", "历史未改变，请") if has_history else ("Try", "请")
    return Sentence(f"The engine failed: {reason}. {unchanged[0]} again.", f"引擎出错：{reason}。{unchanged[1]}重试。")


def _names(values: Sequence[str], task: str | None = None) -> Sentence:
    """Returns the page's names of tasks, or of sub-tasks of ``task``, which include the API's values."""
    in_english, in_chinese = ([name for name, _ in choices(values, task, localize)] for localize in (en, zh))
    return Sentence(", ".join(in_english), "、".join(in_chinese))
