"""Speech detection by silero-vad, and removal of pauses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from .audio import SAMPLE_RATE, Samples

if TYPE_CHECKING:
    import torch

_VAD_RATE = 16000
_PAUSE_MS = 300
_FADE_S = 0.01


def load_vad(device: str) -> torch.nn.Module:
    """Loads silero-vad's TorchScript model, in inference mode, on a torch device."""
    with _one_thread():  # importing silero_vad sets it to 1 for the whole process
        from silero_vad import load_silero_vad
    model: torch.nn.Module = load_silero_vad().to(device)
    return model


def speech_segments(samples: Samples, vad_model: torch.nn.Module, device: str) -> list[tuple[int, int]]:
    """Returns start and end, in samples at 24 kHz, of each segment of speech, with half a pause (0.15 s) around it.

    Not thread-safe: the model has a state. Clears it afterwards, so that no tensor of it stays on the device.
    """
    import soxr
    import torch
    from silero_vad import get_speech_timestamps

    wave = torch.from_numpy(soxr.resample(samples, SAMPLE_RATE, _VAD_RATE).astype(np.float32)).to(device)
    wave = wave * (0.5 / wave.abs().max())  # the ordinary level of speech, as in the model's training
    try:
        with _one_thread():
            found = get_speech_timestamps(
                wave, vad_model, sampling_rate=_VAD_RATE, min_speech_duration_ms=100,
                min_silence_duration_ms=_PAUSE_MS, speech_pad_ms=_PAUSE_MS // 2,
            )  # fmt: skip
    finally:
        vad_model.reset_states()  # type: ignore[operator]
    ratio = SAMPLE_RATE / _VAD_RATE
    return [(int(part["start"] * ratio), min(int(part["end"] * ratio), len(samples))) for part in found]


def cut(samples: Samples, segments: Sequence[tuple[int, int]]) -> Samples:
    """Keeps the segments of `speech_segments`, which shortens pauses to 0.3 s; joins them by short cross-fades."""
    fade = int(_FADE_S * SAMPLE_RATE)
    ramp = np.linspace(0, 1, fade, dtype=np.float32)
    joined = samples[:0]
    for start, end in segments:
        part = samples[start:end]
        if len(joined):
            crossing = joined[-fade:] * (1 - ramp) + part[:fade] * ramp
            joined, part = joined[:-fade], np.concatenate([crossing, part[fade:]])
        joined = np.concatenate([joined, part])
    return joined


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limits torch to one thread: with two, the model's small steps take ten times as long."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
