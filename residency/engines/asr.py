"""Speech recognition with any model that transformers has a pipeline for: Whisper, wav2vec 2.0 and others."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import EngineUnavailable, pip_install
from .audio import SAMPLE_RATE, read_audio

DEFAULT_MODEL = "openai/whisper-large-v3"
"""The model of the public Step-Audio-EditX app."""

_CHUNK_S = 30


def unavailable(model: str, error: Exception) -> EngineUnavailable:
    """Returns the error for a failed load: unreachable hub, wrong folder, or another kind of model."""
    first_line = next(iter(str(error).splitlines()), "")  # transformers adds paragraphs
    reason = first_line.rstrip(".") or type(error).__name__
    return EngineUnavailable(
        f"The speech recognition {model} cannot be loaded ({reason}): give another model or a folder as "
        f"--asr-model, or write the words of the recording yourself",
        f"无法加载语音识别模型 {model}（{reason}）：请用 --asr-model 指定其他模型或目录，或自行填写录音中的内容",
    )


class Recognizer:
    """Callable that transcribes the recording at a path. Not thread-safe."""

    def __init__(self, pipeline: Any) -> None:
        """Wraps a transformers pipeline. Raises `EngineUnavailable` if an audio package is missing."""
        self.pipeline = pipeline
        for module in ("soundfile", "soxr"):  # needed to read audio: fails now, not at the first recording
            _imported(module)

    @classmethod
    def load(cls, model: str, device: str) -> Recognizer:
        """Loads ``model`` (a folder or a hub id) on a torch ``device``. Raises `EngineUnavailable`."""
        transformers = _imported("transformers")
        try:
            pipeline = transformers.pipeline("automatic-speech-recognition", model=model, device=device)
        except Exception as error:
            raise unavailable(model, error) from error
        return cls(pipeline)

    def __call__(self, path: str) -> str:
        """Transcribes a recording of any length, in any libsndfile format. Raises `InvalidInput`."""
        import soxr

        sample_rate = self.pipeline.feature_extractor.sampling_rate
        samples = soxr.resample(read_audio(path), SAMPLE_RATE, sample_rate)
        # Whisper continues across chunks by timestamps; other models get overlapping chunks.
        whisper = self.pipeline.type == "seq2seq_whisper"
        long: dict[str, object] = {"return_timestamps": True} if whisper else {"chunk_length_s": _CHUNK_S}
        keywords = long if len(samples) > _CHUNK_S * sample_rate else {}
        heard = self.pipeline({"raw": samples, "sampling_rate": sample_rate}, **keywords)
        return str(heard["text"]).strip()


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EngineUnavailable(
            f"Speech recognition needs the Python module {module!r} ({error}): {pip_install()} 'gpu-managed-tts[asr]'",
            f"语音识别需要 Python 模块 {module!r}（{error}）：请执行 {pip_install()} 'gpu-managed-tts[asr]'",
        ) from error
