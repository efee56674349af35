"""Recordings in formats of phones and browsers: a tone, encoded by ffmpeg's libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np

TONE_HZ = 200

#: By file name: ffmpeg's names of encoder and container, and samples per second.
FORMATS: dict[str, tuple[str, str, int]] = {
    "iphone.m4a": ("aac", "ipod", 44100),
    "lossless.m4a": ("alac", "ipod", 48000),
    "camera.mp4": ("aac", "mp4", 48000),
    "raw.aac": ("aac", "adts", 48000),
    "browser.webm": ("libopus", "webm", 48000),
    "old.3gp": ("libopencore_amrnb", "3gp", 8000),
    "old.amr": ("libopencore_amrnb", "amr", 8000),
    "studio.aiff": ("pcm_s16be", "aiff", 48000),
}


def record(path: Path, form: str | None = None, seconds: float = 1.0, **stream: Any) -> Path:
    """Writes a tone in this format of `FORMATS` (default: that of the file's name)."""
    codec, container, rate = FORMATS[form or path.name]
    tone = np.sin(np.arange(int(rate * seconds)) * (2 * np.pi * TONE_HZ / rate)).astype(np.float32) * 0.3
    frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts = rate, 0
    with av.open(str(path), "w", format=container) as file:
        track = file.add_stream(codec, rate=rate, **{"layout": "mono", **stream})
        resampler = av.AudioResampler(track.format, track.layout, rate)
        for piece in [*resampler.resample(frame), None]:
            file.mux(track.encode(piece))
    return path
