"""The WORLD vocoder: converts speech to pitch, spectral envelope and aperiodicity, and back.

M. Morise, F. Yokomori, K. Ozawa: WORLD: A vocoder-based high-quality speech synthesis system for real-time
applications. IEICE Transactions E99-D(7), 2016.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .audio import SAMPLE_RATE, Samples

Floats = NDArray[np.float64]

FRAME_MS = 5.0
FFT_SIZE = 1024
F0_FLOOR, F0_CEIL = 60.0, 700.0


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
