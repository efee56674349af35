"""Speech in the parameters of the WORLD vocoder: conversion to another voice, change of speed, whispering.

M. Morise, F. Yokomori, K. Ozawa: WORLD: A vocoder-based high-quality speech synthesis system for real-time
applications. IEICE Transactions E99-D(7), 2016. Conversion by frequency warping with amplitude scaling after D. Erro,
E. Navas, I. Hernáez: Parametric voice conversion based on bilinear frequency warping plus amplitude scaling. IEEE
TASLP 21(3), 2013. Here the warp is linear, and all parameters are estimated from long-term averages, so that the
recordings may differ in text and language.
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
MIN_VOICED_S = 0.3

_HZ = np.arange(FFT_SIZE // 2 + 1) * SAMPLE_RATE / FFT_SIZE
_MEL = 2595 * np.log10(1 + _HZ / 700)
_MEL_WIDTHS = np.gradient(_MEL)
# Limits within which WORLD's speech stays natural.
_WARPS = np.exp(np.linspace(np.log(0.8), np.log(1.25), 46))
_MAX_PITCH_SHIFT = np.log(2.5)
_SPREAD_RATIOS = (0.6, 1.6)
_VARIATION_RATIOS = (0.65, 1.5)
# -10 and 4 dB: more would make plosives detected as voiced piercing.
_VARIED_BY = (-np.log(10), 0.4 * np.log(10))
# -20 and 12 dB: attenuation is harmless, amplification raises noise.
_GAINS = (-2.0 * np.log(10), 1.2 * np.log(10))
_GAIN_WIDTH_MEL = 30.0
# Speakers with a lower voice have a longer vocal tract: ln warp against ln F0.
_WARP_BY_PITCH = 0.3
_MIN_UNVOICED_FRAMES = 20


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


@dataclass(frozen=True)
class Voice:
    """Long-term features of a speaker. Spectra are natural logs of power, shape [FFT_SIZE // 2 + 1].

    Attributes:
        pitch, spread: median of ln F0 (F0 in Hz) and its standard deviation, by quartiles.
        voiced, variation: mean spectrum of the voiced frames, and its standard deviation.
        unvoiced: mean spectrum of the unvoiced frames; None if there were too few.
        rms: of the speech without pauses.
    """

    pitch: float
    spread: float
    voiced: Floats
    variation: Floats
    unvoiced: Floats | None
    rms: float


def measure(samples: Samples, frames: Frames) -> Voice | None:
    """Measures the voice of a recording; returns None with less than `MIN_VOICED_S` of voiced speech."""
    power = frames.envelope.sum(axis=1)
    voiced = frames.f0 > 0
    full = np.quantile(power[voiced], 0.9) if voiced.any() else 0.0
    voiced &= power > full * 1e-3
    if voiced.sum() * FRAME_MS / 1000 < MIN_VOICED_S:
        return None
    unvoiced = (frames.f0 == 0) & (power > full * 1e-4)
    low, middle, high = np.quantile(np.log(frames.f0[voiced]), [0.25, 0.5, 0.75])
    spectra = _log(frames.envelope)
    return Voice(
        pitch=float(middle),
        spread=float((high - low) / 1.349),
        voiced=spectra[voiced].mean(axis=0),
        variation=spectra[voiced].std(axis=0),
        unvoiced=spectra[unvoiced].mean(axis=0) if unvoiced.sum() >= _MIN_UNVOICED_FRAMES else None,
        rms=speech_rms(samples),
    )


def convert(frames: Frames, source: Voice, target: Voice) -> Frames:
    """Converts frames of the source speaker to the voice of the target; keeps duration, words and melody."""
    warp = _warp(source, target)
    voicing = _voicing(frames.f0)[:, None]
    mean = _warped(source.voiced, warp)
    spectra = _warped(_log(frames.envelope), warp)
    variation = _smoothed(target.variation / np.maximum(_warped(source.variation, warp), 1e-3), 2 * _GAIN_WIDTH_MEL)
    varied = spectra + ((spectra - mean) * (variation.clip(*_VARIATION_RATIOS) - 1)).clip(*_VARIED_BY)
    voiced_gain, unvoiced_gain = _gains(source, target, warp)
    spectra = voicing * (varied + voiced_gain) + (1 - voicing) * (spectra + unvoiced_gain)
    return Frames(
        _converted_pitch(frames.f0, source, target), np.exp(spectra), _warped(frames.aperiodicity, warp).clip(0, 1)
    )


def _converted_pitch(f0: Floats, source: Voice, target: Voice) -> Floats:
    shift = np.clip(target.pitch - source.pitch, -_MAX_PITCH_SHIFT, _MAX_PITCH_SHIFT)
    spread = np.clip(target.spread / max(source.spread, 1e-3), *_SPREAD_RATIOS)
    deviation = np.log(np.maximum(f0, F0_FLOOR)) - source.pitch
    converted = np.exp(source.pitch + shift + deviation * spread).clip(F0_FLOOR, F0_CEIL)
    return np.where(f0 > 0, converted, 0.0)


def _voicing(f0: Floats) -> Floats:
    """Returns 1 where voiced, 0 where not, with edges of 25 ms so that spectra do not jump."""
    padded = np.pad((f0 > 0).astype(np.float64), 2, mode="edge")
    return np.convolve(padded, np.full(5, 0.2), mode="valid")


def _warp(source: Voice, target: Voice) -> float:
    """Estimates the ratio of the target's formants to the source's: best match of spectral shapes, near the ratio
    expected from the pitch."""
    band = (_HZ > 250) & (_HZ < 5000)
    wanted = _shape(target.voiced)[band]
    expected = _WARP_BY_PITCH * (target.pitch - source.pitch)
    costs = [
        np.average((_shape(_warped(source.voiced, warp))[band] - wanted) ** 2, weights=_MEL_WIDTHS[band])
        + 40 * (np.log(warp) - expected) ** 2
        for warp in _WARPS
    ]
    return float(_WARPS[np.argmin(costs)])


def _shape(spectrum: Floats) -> Floats:
    """Returns the formants without the spectral tilt, which depends on the microphone."""
    return _smoothed(spectrum, 60) - _smoothed(spectrum, 500)


def _gains(source: Voice, target: Voice, warp: float) -> tuple[Floats, Floats]:
    """Returns gains for warped log spectra of voiced and unvoiced frames; keeps the level of voiced speech."""
    voiced = _smoothed(target.voiced - _warped(source.voiced, warp), _GAIN_WIDTH_MEL)
    level = np.average(voiced, weights=np.exp(target.voiced))
    unvoiced = voiced
    if source.unvoiced is not None and target.unvoiced is not None:
        unvoiced = _smoothed(target.unvoiced - _warped(source.unvoiced, warp), _GAIN_WIDTH_MEL)
    return (voiced - level).clip(*_GAINS), (unvoiced - level).clip(*_GAINS)


def _warped(spectra: Floats, warp: float) -> Floats:
    """Moves spectra from f to f * warp; the last axis is frequency."""
    position = np.minimum(np.arange(len(_HZ)) / warp, len(_HZ) - 1)
    below = np.minimum(position.astype(np.intp), len(_HZ) - 2)
    part = position - below
    warped: Floats = spectra[..., below] * (1 - part) + spectra[..., below + 1] * part
    return warped


def _smoothed(spectrum: Floats, width_mel: float) -> Floats:
    """Smooths with a Gaussian of that standard deviation on the mel scale."""
    from scipy.ndimage import gaussian_filter1d

    grid = np.linspace(0, _MEL[-1], len(_MEL))
    smooth = gaussian_filter1d(np.interp(grid, _MEL, spectrum), width_mel / grid[1], mode="nearest")
    return np.asarray(np.interp(_MEL, grid, smooth))


def _log(power: Floats) -> Floats:
    return np.log(power + 1e-12)


def change_speed(samples: Samples, rate: float) -> Samples:
    """Makes speech ``rate`` times as fast at the same pitch; float32 [samples / rate], 24 kHz."""
    return _in_pieces(samples, lambda frames: synthesise(frames, FRAME_MS / rate), rate)


def whisper(samples: Samples) -> Samples:
    """Removes voicing, lowers the level, and attenuates low frequencies as in whispering."""
    # Power: falls by 9 dB an octave below 900 Hz, since a whisper lacks the strong low harmonics of the vocal folds.
    tilt = 1 / (1 + (900 / np.maximum(_HZ, 50)) ** 3)

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
