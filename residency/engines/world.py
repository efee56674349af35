"""The WORLD vocoder: speech as pitch, spectral envelope and aperiodicity; speed at constant pitch, and whispering.

M. Morise, F. Yokomori, K. Ozawa: WORLD: A vocoder-based high-quality speech synthesis system for real-time
applications. IEICE Transactions E99-D(7), 2016.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .audio import SAMPLE_RATE, Samples, at_level, quiet_pieces, speech_rms

Floats = NDArray[np.float64]

FRAME_MS = 5.0
FFT_SIZE = 1024
F0_FLOOR, F0_CEIL = 60.0, 700.0
_PIECE_S, _FADE_S = 20, 0.005


@dataclass(frozen=True)
class Frames:
    """Speech in frames of 5 ms.

    f0: Hz, shape [frames]; 0 where unvoiced. envelope: power, [frames, FFT_SIZE // 2 + 1]. aperiodicity: noise part of
    the amplitude, 0 to 1, same shape.
    """

    f0: Floats
    envelope: Floats
    aperiodicity: Floats


def analyse(samples: Samples) -> Frames:
    """Converts speech at 24 kHz, float [samples], to frames."""
    import pyworld

    wave = np.ascontiguousarray(samples, dtype=np.float64)
    # Harvest is slightly better, but ten times as slow.
    rough, times = pyworld.dio(wave, SAMPLE_RATE, f0_floor=F0_FLOOR, f0_ceil=F0_CEIL, frame_period=FRAME_MS)
    f0 = pyworld.stonemask(wave, rough, times, SAMPLE_RATE)
    envelope = pyworld.cheaptrick(wave, f0, times, SAMPLE_RATE, fft_size=FFT_SIZE)
    aperiodicity = pyworld.d4c(wave, f0, times, SAMPLE_RATE, fft_size=FFT_SIZE)
    return Frames(f0, envelope, aperiodicity)


def synthesise(frames: Frames, frame_ms: float = FRAME_MS) -> Samples:
    """Converts frames to float32 [samples] at 24 kHz; a ``frame_ms`` other than 5 changes the speed only."""
    import pyworld

    envelope, aperiodicity = np.ascontiguousarray(frames.envelope), np.ascontiguousarray(frames.aperiodicity)
    wave = pyworld.synthesize(frames.f0, envelope, aperiodicity, SAMPLE_RATE, frame_ms)
    return np.asarray(wave, dtype=np.float32)


def change_speed(samples: Samples, rate: float) -> Samples:
    """Makes speech ``rate`` times as fast at the same pitch; float32 [samples / rate], 24 kHz."""
    return _in_pieces(samples, lambda frames: synthesise(frames, FRAME_MS / rate), rate)


def whisper(samples: Samples) -> Samples:
    """Removes voicing, lowers the level, and attenuates low frequencies as in whispering."""
    hz = np.arange(FFT_SIZE // 2 + 1) * SAMPLE_RATE / FFT_SIZE
    # Power: falls by 9 dB an octave below 900 Hz, since a whisper lacks the strong low harmonics of the vocal folds.
    tilt = 1 / (1 + (900 / np.maximum(hz, 50)) ** 3)

    def unvoiced(frames: Frames) -> Samples:
        f0, aperiodicity = np.zeros_like(frames.f0), np.ones_like(frames.aperiodicity)
        return synthesise(Frames(f0, frames.envelope * tilt, aperiodicity))

    return at_level(_in_pieces(samples, unvoiced, 1.0), speech_rms(samples) * 0.4)


def _in_pieces(samples: Samples, effect: Callable[[Frames], Samples], rate: float) -> Samples:
    """Applies an effect to pieces of about 20 s, split at quiet points: analysis takes 1.6 MB a second.

    Fades the ends of the pieces to avoid clicks.
    """
    done = []
    for piece in quiet_pieces(samples, _PIECE_S):
        length = round(len(piece) / rate)
        out = np.zeros(length, np.float32)
        changed = effect(analyse(piece))[:length]
        out[: len(changed)] = changed
        fade = min(int(_FADE_S * SAMPLE_RATE), length // 2)
        ramp = np.linspace(0, 1, fade, dtype=np.float32)
        out[:fade] *= ramp
        out[length - fade :] *= ramp[::-1]
        done.append(out)
    return np.concatenate(done)
