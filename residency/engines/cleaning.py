"""Noise reduction, and removal of pauses between speech (silero-vad).

Noise: T. Gerkmann, R. C. Hendriks: Unbiased MMSE-based noise power estimation with low complexity and low tracking
delay. IEEE TASLP 20(4), 2012. Gain: Y. Ephraim, D. Malah: Speech enhancement using a minimum mean-square error
log-spectral amplitude estimator. IEEE TASSP 33(2), 1985.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .audio import SAMPLE_RATE, Samples, quiet_pieces

if TYPE_CHECKING:
    import torch

_VAD_RATE = 16000
_PAUSE_MS = 300
_FADE_S = 0.01
_WINDOW, _HOP = 768, 192  # 32 and 8 ms
_PIECE_S = 60  # spectra take 3 MB a second
_SPEECH_SNR = 10 ** (15 / 10)  # expected where speech is present
_LOWEST_GAIN = 10 ** (-18 / 20)  # more would make the remaining noise warble


def denoise(samples: Samples) -> Samples:
    """Reduces background noise; float32 [samples], same length, 24 kHz."""
    return np.concatenate([_denoised(piece) for piece in quiet_pieces(samples, _PIECE_S)])


def _denoised(samples: Samples) -> Samples:
    from scipy.signal import ShortTimeFFT
    from scipy.signal.windows import hann

    transform = ShortTimeFFT(np.sqrt(hann(_WINDOW, sym=False)), _HOP, SAMPLE_RATE)
    padded = np.pad(samples.astype(np.float64), (0, max(0, _WINDOW - len(samples))))
    spectrum = transform.stft(padded)
    power = np.abs(spectrum.T) ** 2 + 1e-12
    gain = _gains(power, _noise(power))
    clean = transform.istft(spectrum * gain.T, k1=len(padded))
    return np.asarray(clean[: len(samples)], dtype=np.float32)


def _noise(power: NDArray[np.float64]) -> NDArray[np.float64]:
    """Estimates the noise power, shape [frames, bands] like the power of the noisy speech."""
    # A recording may begin with speech: start from its quieter frames, not from the first.
    noise = np.quantile(power, 0.1, axis=0) * 2
    tracked = np.empty_like(power)
    smoothed_presence = np.full(power.shape[1], 0.5)
    for index, frame in enumerate(power):
        exponent = np.maximum(-frame / noise * _SPEECH_SNR / (1 + _SPEECH_SNR), -200)
        presence = 1 / (1 + (1 + _SPEECH_SNR) * np.exp(exponent))
        smoothed_presence = 0.9 * smoothed_presence + 0.1 * presence
        # Permanent presence of speech means that the estimate is stuck below the noise.
        presence = np.where(smoothed_presence > 0.99, np.minimum(presence, 0.99), presence)
        noise = 0.8 * noise + 0.2 * (presence * noise + (1 - presence) * frame)
        tracked[index] = noise
    return tracked


def _gains(power: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns log-spectral amplitude gains, 0.13 to 1, with the decision-directed estimate of the a-priori SNR."""
    from scipy.special import exp1

    posterior = power / noise
    gains = np.empty_like(power)
    previous = np.maximum(posterior[0] - 1, 0)
    for index, snr in enumerate(posterior):
        prior = np.maximum(0.98 * previous + 0.02 * np.maximum(snr - 1, 0), 10 ** (-25 / 10))
        wiener = prior / (1 + prior)
        gain = wiener * np.exp(0.5 * exp1(np.maximum(wiener * snr, 1e-10)))
        previous = np.minimum(gain, 1) ** 2 * snr
        gains[index] = gain
    return np.clip(gains, _LOWEST_GAIN, 1)


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
