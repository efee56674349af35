"""Decodes uploaded recordings to mono float32 at 24 kHz; adjusts levels."""

from __future__ import annotations

import itertools
import os

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput

Samples = NDArray[np.float32]

SAMPLE_RATE = 24000
MAX_MINUTES = 10
_MAX_SAMPLES = MAX_MINUTES * 60 * 48_000 * 2  # over all channels: a small file can hold gigabytes
_LOWEST_HZ, _HIGHEST_HZ = 8_000, 192_000
#: Recordings with a lower peak count as silent: -70 dBFS, a few steps of 16-bit audio.
_SILENT_PEAK = 10 ** (-70 / 20)
_PEAK = 0.95
_FRAME = SAMPLE_RATE // 50


def read_audio(path: str) -> Samples:
    """Decodes a file in any libsndfile format (WAV, FLAC, OGG, MP3, AIFF...): float32 [samples], 24 kHz, peak <= 1.

    Averages the channels, or takes the strongest one where they cancel out; removes a constant offset. Raises
    `InvalidInput` if the file is missing, no audio, empty, silent, damaged (NaN, infinite), longer than `MAX_MINUTES`
    or sampled below 8 or above 192 kHz.
    """
    channels, sample_rate = _decode(path)
    name = os.path.basename(path)
    if not len(channels):
        raise InvalidInput(f"{name} has no audio in it: record it again", f"{name} 中没有音频：请重新录制")
    if not np.isfinite(channels).all():
        raise InvalidInput(
            f"{name} is damaged (NaN or infinite samples): export it again from the program that made it",
            f"{name} 已损坏（含 NaN 或无穷大采样值）：请从生成它的程序重新导出",
        )
    samples: Samples = channels.mean(axis=1, dtype=np.float32)
    powers = np.mean(np.square(channels, dtype=np.float64), axis=0)
    if np.mean(np.square(samples, dtype=np.float64)) < powers.max() * 1e-3:  # channels of reversed polarity
        samples = channels[:, powers.argmax()]
    samples = samples - np.float32(samples.mean(dtype=np.float64))
    if np.abs(samples).max() < _SILENT_PEAK:
        raise InvalidInput(
            f"{name} is silent: check the microphone and record it again", f"{name} 是静音：请检查麦克风后重新录制"
        )
    if sample_rate != SAMPLE_RATE:
        import soxr

        samples = np.asarray(soxr.resample(samples, sample_rate, SAMPLE_RATE), dtype=np.float32)
    if len(samples) < SAMPLE_RATE // 10:
        raise InvalidInput(
            f"{name} is shorter than a tenth of a second: give a longer recording",
            f"{name} 不足 0.1 秒：请提供更长的录音",
        )
    # Files with float samples may exceed full scale; resampling overshoots a little.
    peak = float(np.abs(samples).max())
    return samples / np.float32(peak) if peak > 1 else samples


def at_level(samples: Samples, rms: float) -> Samples:
    """Scales speech to a level as measured by `speech_rms`, without clipping."""
    return without_clipping(samples * np.float32(rms / max(speech_rms(samples), 1e-9)))


def without_clipping(samples: Samples) -> Samples:
    """Scales all samples down if the peak exceeds 0.95."""
    peak = float(np.abs(samples).max(initial=0.0))
    return (samples * np.float32(_PEAK / peak) if peak > _PEAK else samples).astype(np.float32, copy=False)


def speech_rms(samples: Samples) -> float:
    """Returns the root mean square over frames of 20 ms within 30 dB of the loudest one, without pauses."""
    powers = _powers(np.pad(samples.astype(np.float64), (0, -len(samples) % _FRAME)))
    return float(np.sqrt(powers[powers >= powers.max(initial=0.0) * 1e-3].mean()))


def quiet_pieces(samples: Samples, seconds: int) -> list[Samples]:
    """Splits a recording at quiet points into pieces of about ``seconds``; concatenated, they are the recording."""
    search = seconds // 5
    cuts = [0]
    while len(samples) - cuts[-1] > (seconds + search) * SAMPLE_RATE:
        start = cuts[-1] + (seconds - search) * SAMPLE_RATE
        powers = _powers(samples[start : start + 2 * search * SAMPLE_RATE])
        cuts.append(start + int(powers.argmin()) * _FRAME + _FRAME // 2)
    return [samples[start:end] for start, end in itertools.pairwise([*cuts, len(samples)])]


def _powers(samples: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.asarray(np.mean(samples.reshape(-1, _FRAME) ** 2, axis=1))


def _decode(path: str) -> tuple[NDArray[np.float32], int]:
    """Returns samples [frames, channels] and the sample rate in Hz."""
    import soundfile

    if not path:
        raise InvalidInput("No audio was given: upload or record some", "没有提供音频：请上传或录制")
    name = os.path.basename(path)
    if not os.path.isfile(path):
        raise InvalidInput(f"{name} is gone: upload or record it again", f"{name} 已不存在：请重新上传或录制")
    try:
        with soundfile.SoundFile(path) as file:
            sample_rate = int(file.samplerate)
            if not _LOWEST_HZ <= sample_rate <= _HIGHEST_HZ:
                raise InvalidInput(
                    f"{name} has {sample_rate} samples per second: give audio of 8 to 192 kHz",
                    f"{name} 的采样率为 {sample_rate} Hz：请提供 8 至 192 kHz 的音频",
                )
            limit = min(MAX_MINUTES * 60 * sample_rate, _MAX_SAMPLES // file.channels)
            # Counted while reading: the length in a header may be wrong or missing.
            samples = file.read(limit + 1, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        # Not str(error): it contains the path on this machine.
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or type(error).__name__
        raise InvalidInput(
            f"{name} cannot be read as audio ({reason}): convert it to WAV, FLAC, OGG or MP3",
            f"{name} 无法作为音频读取（{reason}）：请转换为 WAV、FLAC、OGG 或 MP3",
        ) from error
    if len(samples) > limit:
        raise InvalidInput(
            f"{name} is longer than {limit / sample_rate:.0f} s: cut it into pieces, or convert it to mono at 48 kHz",
            f"{name} 超过 {limit / sample_rate:.0f} 秒：请切成几段，或转换为 48 kHz 单声道",
        )
    return samples, sample_rate
