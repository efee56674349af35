"""Edits through WORLD: speed at constant pitch, and whispering."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from .audio import SAMPLE_RATE, Samples, at_level, quiet_pieces, speech_rms
from .world import FFT_SIZE, FRAME_MS, Frames, analyse, synthesise

_PIECE_S, _FADE_S = 20, 0.005


def change_speed(samples: Samples, rate: float) -> Samples:
    """Makes speech ``rate`` times as fast at the same pitch; float32 [samples / rate], 24 kHz."""
    return _in_pieces(samples, lambda frames: synthesise(frames, FRAME_MS / rate), rate)


def whisper(samples: Samples) -> Samples:
    """Removes voicing, lowers the level, and attenuates low frequencies as in whispering."""
    hz = np.arange(FFT_SIZE // 2 + 1) * SAMPLE_RATE / FFT_SIZE
    # Without vocal fold pulses, the spectrum falls by 9 dB an octave below about 1 kHz.
    tilt = 1 / (1 + (900 / np.maximum(hz, 50)) ** 3)

    def unvoiced(frames: Frames) -> Samples:
        return synthesise(
            dataclasses.replace(
                frames,
                f0=np.zeros_like(frames.f0),
                envelope=frames.envelope * tilt,
                aperiodicity=np.ones_like(frames.aperiodicity),
            )
        )

    return at_level(_in_pieces(samples, unvoiced, 1.0), speech_rms(samples) * 0.4)


def _in_pieces(samples: Samples, effect: Callable[[Frames], Samples], rate: float) -> Samples:
    """Applies an effect to pieces of about 20 s, split at quiet points: analysis takes 1.6 MB a second."""
    done = []
    for piece in quiet_pieces(samples, _PIECE_S):
        out = effect(analyse(piece))
        length = round(len(piece) / rate)
        done.append(_faded(np.pad(out, (0, max(0, length - len(out))))[:length]))
    return np.concatenate(done)


def _faded(samples: Samples) -> Samples:
    """Fades the ends to avoid clicks."""
    fade = min(int(_FADE_S * SAMPLE_RATE), len(samples) // 2)
    ramp = np.linspace(0, 1, fade, dtype=np.float32)
    samples = samples.copy()
    samples[:fade] *= ramp
    samples[len(samples) - fade :] *= ramp[::-1]
    return samples
