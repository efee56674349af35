"""Measures the encoders of speech responses, and the division of texts into sentences.

    python benchmarks/encoding.py

Encodes a minute of noise with pauses at 24 kHz, in pieces of 5 s; of 1 ms for the first sound.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import av
import numpy as np

from residency.web.speech.encoding import MEDIA_TYPES, Encoder
from residency.web.speech.segments import sentences

RATE = 24_000
TEXTS = {
    "English": "Dr. Smith paid 3.14 dollars at 5 p.m. on Jan. 5th, and left. ",
    "Chinese": "我们今天去公园，天气很好。",
    "dots": ".",
    "closing quotes": "。”",
    "no punctuation": "x",
}


def encode(format: str, sound: np.ndarray, speed: float, piece: int) -> tuple[int, int, float]:
    """Returns the samples given before the first sound came out, all bytes, and seconds."""
    with Encoder(format, RATE, speed) as encoder:
        header = 44 if format == "wav" else 200 if format in ("opus", "flac") else 0
        first = size = 0
        start = time.perf_counter()
        for at in range(0, len(sound), piece):
            size += len(encoder.encode(sound[at : at + piece]))
            if not first and size > header:
                first = at + piece
        size += len(encoder.finish())
        return first, size, time.perf_counter() - start


def main() -> None:
    cores, load = os.cpu_count(), os.getloadavg()[0]
    versions = f"Python {platform.python_version()}, PyAV {av.__version__}"
    print(f"{datetime.date.today()}, {versions}, {cores} cores, load average {load:.1f}")
    time_s = np.arange(60 * RATE) / RATE
    sound = np.random.default_rng(0).normal(0, 0.1, len(time_s)) * (np.sin(2 * np.pi * time_s) > 0)
    sound = sound.astype(np.float32)
    print(f"\n{'format':8}{'speed':>8}{'first sound after':>20}{'kbit per s':>12}{'times real time':>18}")
    for format in MEDIA_TYPES:
        for speed in (1.0, 1.5):
            first, _, _ = encode(format, sound[:RATE], speed, RATE // 1000)
            _, size, took_s = encode(format, sound, speed, 5 * RATE)
            kbits = size * 8 * speed / 60_000
            print(f"{format:8}{speed:8}{first:12} samples{kbits:12.0f}{60 / took_s:18.0f}")
    print(f"\n{'100,000 characters':20}{'sentences':>12}{'ms':>12}")
    for name, part in TEXTS.items():
        text = (part * 100_000)[:100_000]
        start = time.perf_counter()
        found = sentences(text)
        print(f"{name:20}{len(found):12}{(time.perf_counter() - start) * 1000:12.0f}")


if __name__ == "__main__":
    main()
