"""Malformed and valid test uploads: name, bytes, and validity."""

from __future__ import annotations

import functools
import io
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import hibari
import numpy as np
import soundfile
import soxr

FORMATS = {"wav": "WAV", "flac": "FLAC", "ogg": "OGG", "mp3": "MP3", "aiff": "AIFF"}
NAMES = (
    "../../../../tmp/escaped.wav", "..\\..\\escaped.wav", "/etc/cron.d/escaped.wav", "C:\\escaped.wav", "a\0b.wav",
    "a\nb.wav", "<script>alert(1)</script>.wav", "\u202evaw.exe", "录音 – naïve 🎙️.wav", "x" * 400 + ".wav", ".wav",
    "..", "con.wav", "%2e%2e%2fescaped.wav", "a;b|c&d.wav", "$(touch escaped).wav", "-rf.wav", "editx-1/x.wav", "",
)  # fmt: skip

FILE = "{file}"  # placeholder for the uploaded file
#: Bodies of handwritten calls of clone.
BODIES: tuple[tuple[object, ...], ...] = (
    (), (FILE,), (FILE, "Good morning.", "Hello.", "more"), (None, None, None), (None, "Good morning.", "Hello."),
    (FILE, None, "Hello."), (FILE, "Good morning.", None), (FILE, 7, True), (FILE, ["Good", "morning."], {"a": 1}),
    (FILE, "", "  \n"), (FILE, "\0\ud83d\x1b[31m", "Hello."), (FILE, "Good morning.", "a" * 5_000_000),
    ("/etc/passwd", "a", "b"), ({"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "a", "b"),
    ({"path": "http://127.0.0.1:9/a.wav", "meta": {"_type": "gradio.FileData"}}, "a", "b"),
    ({"url": "file:///etc/passwd", "meta": {"_type": "gradio.FileData"}}, "a", "b"), ({}, "a", "b"), ([], "a", "b"),
    ([FILE, FILE], "a", "b"), (functools.reduce(lambda inner, _: [inner], range(100), []), "a", "b"),
    (float("nan"), float("inf"), -0.0), ([16000, [0.1] * 100], "a", "b"),
)  # fmt: skip


@dataclass(frozen=True)
class Upload:
    kind: str
    name: str
    content: bytes
    good: bool = False
    copies: int = 1  #: number in one body
    data: tuple[object, ...] = (FILE, "Good morning.", "Hello.")  #: arguments of clone


def uploads(count: int, seed: int) -> Iterator[Upload]:
    """Yields equal numbers of every kind, shuffled by the seed."""
    chance = random.Random(seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    chance.shuffle(kinds)
    for kind in kinds:
        yield kind(chance)


@functools.cache
def _speech() -> tuple[np.ndarray, int]:
    """Returns a few seconds of speech, and the sample rate in Hz."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/voice.wav"
        hibari.Hibari().save("Good morning, this is a short recording of my voice.", path, seed=1)
        return soundfile.read(path)


def _voice(chance: random.Random, seconds: float | None = None, rate: int = 16000) -> np.ndarray:
    """Returns two to four seconds of it (or ``seconds``), at a random level."""
    samples, own_rate = _speech()
    samples = soxr.resample(samples[: round(own_rate * (seconds or chance.uniform(2, 4)))], own_rate, rate)
    return samples * chance.uniform(0.3, 0.9) / max(abs(samples).max(), 1e-9)


def _encoded(samples: np.ndarray, rate: int, form: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=FORMATS[form], subtype=subtype)
    return file.getvalue()


def good(chance: random.Random) -> Upload:
    form = chance.choice(list(FORMATS))
    rate = chance.choice([8000, 16000, 22050, 44100, 48000])
    samples = _voice(chance, rate=rate)
    if chance.random() < 0.4:
        samples = np.stack([samples, 0.5 * samples], axis=1)
    return Upload("good", f"voice.{form}", _encoded(samples, rate, form), good=True)


def named_badly(chance: random.Random) -> Upload:
    return Upload("path tricks in the name", chance.choice(NAMES), _encoded(_voice(chance), 16000, "wav"))


def truncated(chance: random.Random) -> Upload:
    form = chance.choice(list(FORMATS))
    content = _encoded(_voice(chance), 16000, form)
    return Upload("truncated", f"voice.{form}", content[: chance.randrange(len(content))])


def flipped(chance: random.Random) -> Upload:
    form = chance.choice(list(FORMATS))
    content = bytearray(_encoded(_voice(chance), 16000, form))
    for _ in range(chance.choice([1, 10, 100])):
        content[chance.randrange(min(len(content), chance.choice([64, 4096, len(content)])))] = chance.randrange(256)
    return Upload("bits flipped", f"voice.{form}", bytes(content))


def renamed(chance: random.Random) -> Upload:
    content = chance.choice([b"", b"\x89PNG\r\n\x1a\n" + bytes(500), b"PK\x03\x04" + bytes(500), b"#!/bin/sh\nexit\n",
                             b"<html><script>alert(1)</script></html>", chance.randbytes(5000),
                             _encoded(_voice(chance), 16000, "flac"), b"OggS" + chance.randbytes(3000),
                             b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + bytes(100)])  # fmt: skip
    return Upload("renamed", chance.choice(["voice.wav", "voice.mp3", "voice.html", "voice.svg", "voice"]), content)


def huge_header(chance: random.Random) -> Upload:
    rate = chance.choice([0, 1, 16000, 4_000_000_000])
    channels = chance.choice([0, 1, 1000, 65535])
    bits = chance.choice([0, 1, 16, 24, 65535])
    said = chance.choice([0, 10, 0x7FFFFFFF, 0xFFFFFFFF])
    data = bytes(_voice(chance, 1).astype("<f4").tobytes())
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", chance.choice([0, 36, 0xFFFFFFFF]), b"WAVE", b"fmt ", 16,
                       chance.choice([1, 3, 6, 0xFFFE]), channels, rate, 0xFFFFFFFF, 0xFFFF, bits, b"data",
                       said)  # fmt: skip
    return Upload("huge headers", "voice.wav", head + data)


def not_numbers(chance: random.Random) -> Upload:
    samples = _voice(chance)
    where = chance.choice([slice(0, 1), slice(100, 200), slice(None)])
    samples[where] = chance.choice([np.nan, np.inf, -np.inf, 1e38])
    return Upload("NaN and infinite", "voice.wav", _encoded(samples, 16000, "wav", "FLOAT"))


def bomb(chance: random.Random) -> Upload:
    """Returns a small file with large decoded audio."""
    rate, hours = chance.choice([(8000, 8), (48000, 1), (192000, 0.5)])
    samples = np.zeros((round(rate * 3600 * hours), 1), np.int16)
    return Upload("zip bombs", "voice.flac", _encoded(samples, rate, "flac"))


def nothing(chance: random.Random) -> Upload:
    samples = chance.choice([np.zeros(0), np.zeros(1), np.zeros(16000), np.full(16000, 0.7), _voice(chance, 0.05)])
    return Upload("silent, empty or short", "voice.wav", _encoded(samples, 16000, "wav"))


def many_channels(chance: random.Random) -> Upload:
    form, most = chance.choice([("wav", 1000), ("flac", 8), ("ogg", 255), ("aiff", 64)])
    samples = np.stack([_voice(chance, 2)] * chance.choice([3, 6, 8, most]), axis=1)
    return Upload("many channels", f"voice.{form}", _encoded(samples, 16000, form))


def many_files(chance: random.Random) -> Upload:
    content = _encoded(_voice(chance), 16000, "flac")
    return Upload("many files in one body", "voice.flac", content, copies=chance.choice([2, 20, 1001]))


def odd_body(chance: random.Random) -> Upload:
    content = _encoded(_voice(chance), 16000, "wav")
    return Upload("odd bodies of the call", "voice.wav", content, data=chance.choice(BODIES))


KINDS: list[Callable[[random.Random], Upload]] = [
    good, named_badly, truncated, flipped, renamed, huge_header, not_numbers, bomb, nothing, many_channels,
    many_files, odd_body,
]  # fmt: skip
