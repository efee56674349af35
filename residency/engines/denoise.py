"""Spectral noise reduction: tracks the noise in each band and attenuates according to the SNR.

Noise: T. Gerkmann, R. C. Hendriks: Unbiased MMSE-based noise power estimation with low complexity and low tracking
delay. IEEE TASLP 20(4), 2012. Gain: Y. Ephraim, D. Malah: Speech enhancement using a minimum mean-square error
log-spectral amplitude estimator. IEEE TASSP 33(2), 1985.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .audio import SAMPLE_RATE, Samples, quiet_pieces

Floats = NDArray[np.float64]

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


def _noise(power: Floats) -> Floats:
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


def _gains(power: Floats, noise: Floats) -> Floats:
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
