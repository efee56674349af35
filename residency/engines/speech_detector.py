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
_LONGEST_PAUSE_S = 0.3
_MARGIN_S = 0.1
_FADE_S = 0.01


def load_vad(device: str) -> torch.nn.Module:
    """Loads silero-vad's TorchScript model, in inference mode, on a torch device."""
    with _one_thread():  # importing silero_vad sets it to 1 for the whole process
        from silero_vad import load_silero_vad
    model: torch.nn.Module = load_silero_vad().to(device)
    return model


def speech_segments(samples: Samples, vad_model: torch.nn.Module, device: str) -> list[tuple[int, int]]:
    """Returns start and end, in samples at 24 kHz, of each segment of speech.

    Not thread-safe: the model has a state. Clears it afterwards, so that no tensor of it stays on the device.
    """
    import soxr
    import torch
    from silero_vad import get_speech_timestamps

    wave = torch.from_numpy(soxr.resample(samples, SAMPLE_RATE, _VAD_RATE).astype(np.float32)).to(device)
    # The model was trained on speech of ordinary level.
    wave = wave * (0.5 / wave.abs().max())
    try:
        with _one_thread():
            found = get_speech_timestamps(wave, vad_model, sampling_rate=_VAD_RATE, min_speech_duration_ms=100)
    finally:
        vad_model.reset_states()  # type: ignore[operator]
    ratio = SAMPLE_RATE / _VAD_RATE
    return [(int(part["start"] * ratio), min(int(part["end"] * ratio), len(samples))) for part in found]


def cut(samples: Samples, segments: Sequence[tuple[int, int]]) -> Samples:
    """Keeps the speech, with pauses of at most 0.3 s between and 0.1 s around it; float32 [samples].

    Of a longer pause, its beginning and end remain, joined by a short cross-fade.
    """
    if not segments:
        return samples[:0]
    margin, longest = int(_MARGIN_S * SAMPLE_RATE), int(_LONGEST_PAUSE_S * SAMPLE_RATE)
    kept = [(max(segments[0][0] - margin, 0), segments[0][1])]
    for start, end in segments[1:]:
        last_start, last_end = kept[-1]
        if start - last_end <= longest:
            kept[-1] = (last_start, end)
        else:
            kept[-1] = (last_start, last_end + longest // 2)
            kept.append((start - longest // 2, end))
    kept[-1] = (kept[-1][0], min(kept[-1][1] + margin, len(samples)))
    return _joined([samples[start:end] for start, end in kept])


def _joined(parts: Sequence[Samples]) -> Samples:
    fade = int(_FADE_S * SAMPLE_RATE)
    ramp = np.linspace(0, 1, fade, dtype=np.float32)
    joined = parts[0]
    for part in parts[1:]:
        crossing = joined[-fade:] * (1 - ramp) + part[:fade] * ramp
        joined = np.concatenate([joined[:-fade], crossing, part[fade:]])
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
