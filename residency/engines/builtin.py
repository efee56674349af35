"""The engine without a download or a GPU: English speech by hibari, voices by WORLD, pauses by silero-vad."""

from __future__ import annotations

import logging
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

import numpy as np

from ..cancellation import checkpoint
from ..errors import InvalidInput, RequestStopped, about
from . import world
from .audio import SAMPLE_RATE, Samples, at_level, read_audio, without_clipping
from .cleaning import cut, denoise, load_vad, speech_segments
from .text import required, speakable

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_SPEEDS = {"faster": 1.2, "slower": 1 / 1.2, "more faster": 1.45, "more slower": 1 / 1.45}
_PROMPT_S = 30  # a longer prompt does not improve the voice
_REAL_MODEL_ONLY = ("emotion", "paralinguistic")
# Synthesized once to measure the engine's own voice: contains all English phonemes, with ordinary melody.
_REFERENCE_TEXT = (
    "The beige hue on the waters of the loch impressed all, including the French queen, before she heard that symphony "
    "again, just as young Arthur wanted. I usually measure the voyage by the joy of those who watch."
)


class HTTPException(Exception):
    """Unknown edit type; has the fields of StepAudioTTS's exception of this name."""

    def __init__(self, status_code: HTTPStatus, detail: str) -> None:
        super().__init__(status_code, detail)
        self.status_code, self.detail = status_code, detail

    def __str__(self) -> str:
        return self.detail


def supported_edit_types() -> dict[str, list[str]]:
    """Returns tasks and their sub-tasks (``edit_info``), in the order of the page. Imports nothing."""
    return {"clone": [], "style": ["whisper"], "vad": [], "denoise": [], "speed": list(_SPEEDS)}


class BuiltinEngine:
    """Speech in the voice of a recording, and edits of recordings, on any machine.

    hibari (ONNX Runtime, on the CPU) synthesizes the text; WORLD applies the prompt's pitch, vocal-tract length and
    spectrum. silero-vad detects speech on ``device``. The constructor loads all models, so that a manager finds all
    sessions and tensors at once.

    Not thread-safe. Stateless: results depend on the arguments and the seed only. A cancelled call (see
    `residency.cancellation`) ends after the current sentence or step.
    """

    def __init__(self, device: str = "cpu", seed: int | None = None) -> None:
        """``device`` is torch's. ``seed`` is for the noise in the speech; None draws one from torch's global generator
        for each `clone`, so that ``torch.manual_seed`` controls it."""
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reports model names to its makers otherwise
        from hibari import Hibari

        self.device = device
        self.seed = seed
        self.hibari = Hibari()
        _ = self.hibari.g2p.oov  # otherwise created on first use
        self.vad_model = load_vad(device)
        reference = self.hibari(_REFERENCE_TEXT, seed=0)
        own_voice = world.measure(reference, world.analyse(reference))
        assert own_voice is not None, "the reference text is voiced speech"
        self._own_voice = own_voice

    @staticmethod
    def check_text(target_text: str) -> None:
        """Raises `InvalidInput` if the text is empty, too long, or not English. Needs no engine and no model."""
        with about("target_text"):
            speakable(target_text)

    def clone(self, prompt_wav_path: str, prompt_text: str, target_text: str) -> tuple[torch.Tensor, int]:
        """Synthesizes an English text in the voice of a recording.

        Takes a file in a libsndfile format (8 to 192 kHz, any number of channels, up to 10 minutes), its text in any
        language (required, as for the real model), and up to 5,000 characters. Returns float32 of shape [1, samples]
        on the CPU, within -1 to 1, and the sample rate, 24000. Raises `InvalidInput`.
        """
        with _logging_errors("Clone"):
            with about("prompt_text"):
                required(prompt_text, "Prompt Text", "提示文本")
            with about("target_text"):
                chunks = self._phonemes(speakable(target_text))
            with about("recording"):
                target = self._voice_of(read_audio(prompt_wav_path))
            import torch

            seed = int(torch.randint(2**31, ()).item()) if self.seed is None else self.seed
            speech = self._synthesize(chunks, target, np.random.default_rng(seed))
            return _result(at_level(speech, float(np.clip(target.rms, 0.03, 0.12))))

    def edit(
        self,
        input_audio_path: str,
        audio_text: str,
        edit_type: str,
        edit_info: str | None = None,
        text: str | None = None,
    ) -> tuple[torch.Tensor, int]:
        """Edits a recording; input and result as for `clone`.

        ``edit_type`` is ``denoise``, ``vad`` (cuts pauses to 0.3 s), ``style`` or ``whisper``, or ``speed`` with a key
        of `_SPEEDS` as ``edit_info``. Ignores ``audio_text`` and ``text``, arguments of the real model. Raises
        `InvalidInput`, also for an edit that only the real model supports, and `HTTPException` for an unknown one.
        """
        with _logging_errors("Edit"):
            _check_edit(edit_type, edit_info)
            with about("recording"):
                samples = read_audio(input_audio_path)
                checkpoint()
                if edit_type == "speed":
                    return _result(world.change_speed(samples, _SPEEDS[str(edit_info)]))
                edits = {"denoise": denoise, "vad": self._speech_in}
                return _result(edits.get(edit_type, world.whisper)(samples))

    def _phonemes(self, text: str) -> list[str]:
        """Returns the phonemes in chunks of at most 400; raises `InvalidInput` if no word can be pronounced."""
        try:
            sentences = self.hibari.phonemize(text)
        except (IndexError, ValueError) as error:
            raise InvalidInput(
                f"The text cannot be pronounced ({error}): write very long numbers in words",
                f"无法朗读该文本（{error}）：请将过长的数字写成单词",
            ) from error
        # hibari splits sentences at their punctuation; a long one without any is wrapped.
        wrapped = [textwrap.wrap(each, 400, break_long_words=False, break_on_hyphens=False) for each in sentences]
        chunks = [chunk for sentence in wrapped for chunk in sentence if any(map(str.isalpha, chunk))]
        if not chunks:
            raise InvalidInput(
                "There is nothing to pronounce in the Target Text: write some words",
                "目标文本中没有可朗读的内容：请填写一些单词",
            )
        return chunks

    def _speech_in(self, samples: Samples) -> Samples:
        """Removes long pauses from a recording; raises `InvalidInput` without speech."""
        segments = speech_segments(samples, self.vad_model, self.device)
        if not segments:
            raise InvalidInput(
                "No speech was found in the recording: give one with speech",
                "录音中没有检测到语音：请提供含有语音的录音",
            )
        return cut(samples, segments)

    def _voice_of(self, samples: Samples) -> world.Voice:
        """Measures the voice of a recording; raises `InvalidInput` if there is too little speech."""
        checkpoint()
        # Otherwise noise would be measured as part of the voice.
        speech = denoise(self._speech_in(samples)[: _PROMPT_S * SAMPLE_RATE])
        checkpoint()
        measured = world.measure(speech, world.analyse(speech))
        if measured is None:
            raise InvalidInput(
                f"The recording has less than {world.MIN_VOICED_S} s of voiced speech: give a few seconds of ordinary "
                f"speech, not a whisper",
                f"录音中的有声语音不足 {world.MIN_VOICED_S} 秒：请提供几秒钟的正常说话录音，不要用耳语",
            )
        return measured

    def _synthesize(self, chunks: list[str], target: world.Voice, rng: np.random.Generator) -> Samples:
        spoken = []
        for chunk in chunks:
            checkpoint()
            plain = self.hibari.from_ids(self.hibari.ids(chunk), rng=rng)
            converted = world.synthesise(world.convert(world.analyse(plain), self._own_voice, target))
            spoken.append(converted[: len(plain)])
        return np.concatenate(spoken)


@contextmanager
def _logging_errors(task: str) -> Iterator[None]:
    """Logs unexpected errors, as the real engine does."""
    try:
        yield
    except (RequestStopped, InvalidInput):
        raise
    except Exception as error:
        logger.error("%s failed: %s", task, error)
        raise


def _check_edit(edit_type: str, edit_info: str | None) -> None:
    sub_tasks = supported_edit_types().get(edit_type, [])
    if edit_type in ("whisper", "denoise", "vad") or edit_info in sub_tasks:
        return
    can = "speed, denoise, vad, style whisper"
    if edit_type in _REAL_MODEL_ONLY or edit_type == "style":
        asked = f"{edit_type} {edit_info or ''}".strip()
        raise InvalidInput(
            f"The built-in engine cannot do {asked!r}, only {can}: start the app with --model-path and "
            f"Step-Audio-EditX for the rest",
            f"内置引擎不支持 {asked!r}，仅支持 {can}：其余编辑请以 --model-path 启动 Step-Audio-EditX",
            "sub_task" if edit_type == "style" else "task",
        )
    if edit_type == "speed":
        raise InvalidInput(
            f"speed has no sub-task {edit_info!r}: choose one of {', '.join(_SPEEDS)}",
            f"speed 没有子任务 {edit_info!r}：请选择 {'、'.join(_SPEEDS)}",
            "sub_task",
        )
    raise HTTPException(HTTPStatus.BAD_REQUEST, f"Unsupported edit_type: {edit_type}; this engine does {can}")


def _result(samples: Samples) -> tuple[torch.Tensor, int]:
    import torch

    return torch.from_numpy(without_clipping(samples)).unsqueeze(0), SAMPLE_RATE
