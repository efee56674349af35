"""Joins the sentences of a text into one sound, and encodes it as it is made, in the formats of OpenAI's speech API.

PyAV (ffmpeg) encodes and changes the speed. Without it, `wav` and `pcm` work at the speed 1.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import InvalidInput, pip_install

if TYPE_CHECKING:
    import av

Samples = NDArray[np.float32]

MEDIA_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",  # the registered type of Ogg files, which browsers play; audio/opus is a payload of RTP
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
"""Media types by format."""

PCM_RATE_HZ = 24_000
"""Sample rate of `pcm`, which has no header that could tell it."""

SPEEDS = 0.25, 4.0
"""The least and the highest speed."""

FADE_S = 0.02
"""Duration of the cross-fade between two sentences."""

_UNKNOWN_SIZE = 0xFFFFFFFF
#: ffmpeg's muxer, its options, encoder and bits per second (None: lossless), by format. By
#: default, an Ogg page lasts a second, and a FLAC header has 8 kB of padding.
_CODECS: dict[str, tuple[str, dict[str, str], str, int | None]] = {
    "mp3": ("mp3", {"write_xing": "0", "id3v2_version": "0"}, "libmp3lame", 128_000),
    "opus": ("ogg", {"page_duration": "60000"}, "libopus", 64_000),
    "aac": ("adts", {}, "aac", 96_000),
    "flac": ("flac", {"metadata_header_padding": "0"}, "flac", None),
}


def check_form(format: str, speed: float = 1.0) -> None:
    """Raises `InvalidInput` if there is no such format or speed, or it needs PyAV, which is not installed."""
    if format not in MEDIA_TYPES:
        known = ", ".join(MEDIA_TYPES)
        raise InvalidInput(
            f"The format {format!r} is not supported: use one of {known}",
            f"不支持格式 {format!r}：请使用 {known} 之一",
        )
    if not SPEEDS[0] <= speed <= SPEEDS[1]:
        raise InvalidInput(
            f"The speed is not from {SPEEDS[0]:g} to {SPEEDS[1]:g}: 1 is the speed of the voice",
            f"语速不在 {SPEEDS[0]:g} 到 {SPEEDS[1]:g} 之间：1 为原语速",
        )
    if (format in _CODECS or speed != 1) and importlib.util.find_spec("av") is None:
        raise InvalidInput(
            f"The server can send only wav and pcm, at the speed 1, without the package av: use one of these, or "
            f"install it with {pip_install()} 'gpu-managed-tts[app]'",
            f"服务器缺少软件包 av，只能以语速 1 输出 wav 和 pcm：请改用二者之一，或执行 "
            f"{pip_install()} 'gpu-managed-tts[app]'",
        )


class Joiner:
    """Joins sentences with a cross-fade of 20 ms. Not thread-safe.

    The fade is linear: the weights' sum is 1, so the sound is never louder than both sentences. One of constant power
    would add up to 3 dB where they are alike; the dip of a linear one, where they differ, is in the pause between them.
    A sentence that is shorter than the fade is faded over its whole length.
    """

    def __init__(self, sample_rate: int) -> None:
        """``sample_rate``: of all sentences, in Hz."""
        self._fade = round(FADE_S * sample_rate)
        self._held = _floats([])

    def add(self, samples: ArrayLike) -> Samples:
        """Takes a sentence of shape ``(n,)``; returns all samples that are ready, which excludes the last 20 ms.

        The result is float32 within -1 and 1, of shape ``(m,)``; see `Encoder.encode` for accepted samples.
        """
        added = _floats(samples)
        both = min(len(self._held), len(added))
        gain = np.arange(1, both + 1, dtype=np.float32) / np.float32(both + 1)
        before = len(self._held) - both
        faded = self._held[before:] * (1 - gain) + added[:both] * gain
        joined = np.concatenate([self._held[:before], faded, added[both:]])
        ready = max(0, len(joined) - self._fade)
        self._held = joined[ready:]
        return joined[:ready]

    def finish(self) -> Samples:
        """Returns the held samples, at most 20 ms."""
        held, self._held = self._held, _floats([])
        return held


class Encoder:
    """Encodes one sound, mono, as a stream: returns bytes as soon as the container has them, and never changes them.

    The first sound is in the bytes after 1 sample (`wav`, `pcm`), 2,400 samples (`flac`), 1,920 (`mp3`), 2,160 (`aac`)
    or 2,880 (`opus`), at 24 kHz and the speed 1. The sample rate is the given one, or the next that the codec has; that
    of `pcm` is 24 kHz. `wav` and `pcm` have 16 bits, little-endian.

    A context manager, which frees ffmpeg's memory. Only one thread at a time may use an encoder; different encoders are
    independent.
    """

    def __init__(self, format: str, sample_rate: int, speed: float = 1.0, *, whole: int | None = None) -> None:
        """Begins a sound.

        Args:
            format: a key of `MEDIA_TYPES`.
            sample_rate: of the given samples, in Hz.
            speed: 0.25 to 4; changes the duration and keeps the pitch. At 1, no sample is changed.
            whole: number of all samples, if known before: then the headers of `wav` and `flac` contain it, unless the
                speed changes it. Without, the sizes of `wav` are 0xFFFFFFFF ("until the end"), that of `flac`
                is 0 ("unknown"), which libsndfile cannot read.

        Raises:
            InvalidInput: the format or speed does not exist, or needs PyAV, which is not installed.
        """
        check_form(format, speed)
        self._tempo = None if speed == 1 else _Tempo(sample_rate, speed)
        make = _Compressed if format in _CODECS else _Uncompressed
        self._sink = make(format, sample_rate, whole if speed == 1 else None)

    def encode(self, samples: ArrayLike) -> bytes:
        """Takes further samples, of shape ``(n,)``; returns all bytes that are ready, which may be none.

        Samples are floats within -1 and 1, or signed integers. Louder ones are clipped, NaN is silence.

        Raises:
            ValueError: the samples have more than one dimension.
        """
        given = _floats(samples)
        return self._sink.encode(self._tempo.change(given) if self._tempo else given)

    def finish(self) -> bytes:
        """Returns the rest of the sound. Nothing can be encoded after it."""
        rest = self._sink.encode(self._tempo.finish()) if self._tempo else b""
        return rest + self._sink.finish()

    def close(self) -> None:
        """Frees the memory; may be called repeatedly, and before the end of the sound."""
        self._sink.close()
        self._tempo = None

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Uncompressed:
    """16 bit samples, with a header (`wav`) or at 24 kHz (`pcm`)."""

    def __init__(self, format: str, sample_rate: int, whole: int | None) -> None:
        self._header = b""
        self._resampler: Any = None
        if format == "wav":
            size = _UNKNOWN_SIZE if whole is None else min(2 * whole, _UNKNOWN_SIZE)
            form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
            sizes = min(size + 36, _UNKNOWN_SIZE), size
            self._header = struct.pack("<4sI4s", b"RIFF", sizes[0], b"WAVE") + form + struct.pack("<4sI", b"data", size)
        elif sample_rate != PCM_RATE_HZ:
            import soxr

            self._resampler = soxr.ResampleStream(sample_rate, PCM_RATE_HZ, 1, dtype="float32")

    def encode(self, samples: Samples, last: bool = False) -> bytes:
        if self._resampler:
            samples = self._resampler.resample_chunk(samples, last=last)
        header, self._header = self._header, b""
        return header + np.clip(np.rint(samples * 32768), -32768, 32767).astype("<i2").tobytes()

    def finish(self) -> bytes:
        return self.encode(_floats([]), last=True)

    def close(self) -> None:
        self._resampler = None


class _Compressed:
    """A stream of ffmpeg, written to memory that cannot seek."""

    def __init__(self, format: str, sample_rate: int, whole: int | None) -> None:
        import av

        muxer, options, encoder, bits_per_s = _CODECS[format]
        self._written: list[bytes] = []
        self._frames = _Frames(sample_rate)
        self._container: Any = av.open(self, "w", format=muxer, options=options)
        rates = av.Codec(encoder, "w").audio_rates or [sample_rate]
        rate = min((each for each in rates if each >= sample_rate), default=max(rates))
        stream: Any = self._container.add_stream(encoder, rate=rate, layout="mono")
        if bits_per_s:
            stream.bit_rate = bits_per_s
        self._stream = stream
        self._whole = whole or 0

    def write(self, data: bytes) -> int:
        """Called by the container."""
        self._written.append(bytes(data))
        return len(data)

    def encode(self, samples: Samples) -> bytes:
        return self._encode(self._frames.of(samples)) if len(samples) else b""

    def finish(self) -> bytes:
        rest = self._encode(None)
        self._container.close()
        return rest + self._taken()

    def close(self) -> None:
        if self._container:
            self._container.close()
        self._container = self._stream = None  # the container refers to this object

    def _encode(self, frame: av.AudioFrame | None) -> bytes:
        self._container.mux(self._stream.encode(frame))
        return self._taken()

    def _taken(self) -> bytes:
        taken = b"".join(self._written)
        self._written.clear()
        if taken.startswith(b"fLaC"):  # bits 172 to 207 are the number of samples, 0 if unknown
            number = int.from_bytes(taken[21:26], "big") | self._whole % (1 << 36)
            return taken[:21] + number.to_bytes(5, "big") + taken[26:]
        return taken


class _Tempo:
    """Another speed at the same pitch, by ffmpeg's filter `atempo`."""

    def __init__(self, sample_rate: int, speed: float) -> None:
        import av.filter

        self._frames = _Frames(sample_rate)
        self._graph = av.filter.Graph()
        # A single filter goes down to 0.5, and above 2 drops samples.
        filters = [f"{math.sqrt(speed):.9f}"] * 2 if not 0.5 <= speed <= 2 else [f"{speed:.9f}"]
        source = self._graph.add_abuffer(sample_rate=sample_rate, format="flt", layout="mono")
        chain = [source, *(self._graph.add("atempo", each) for each in filters), self._graph.add("abuffersink")]
        for first, second in itertools.pairwise(chain):
            first.link_to(second)
        self._graph.configure()

    def change(self, samples: Samples) -> Samples:
        """Returns the samples that are ready."""
        return self._push(self._frames.of(samples)) if len(samples) else samples

    def finish(self) -> Samples:
        """Returns the rest."""
        return self._push(None)

    def _push(self, frame: av.AudioFrame | None) -> Samples:
        self._graph.push(frame)
        pulled = [_floats([])]
        while True:
            try:
                pulled.append(self._graph.pull().to_ndarray()[0])
            except (BlockingIOError, EOFError):  # needs more; nothing more comes
                return np.concatenate(pulled)


class _Frames:
    """Consecutive frames of ffmpeg."""

    def __init__(self, sample_rate: int) -> None:
        self._sample_rate = sample_rate
        self._next = 0

    def of(self, samples: Samples) -> av.AudioFrame:
        import av

        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples).reshape(1, -1), format="flt", layout="mono")
        frame.sample_rate = self._sample_rate
        frame.pts = self._next
        self._next += len(samples)
        return frame


def _floats(samples: ArrayLike) -> Samples:
    """Returns samples as float32 within -1 and 1, of shape ``(n,)``."""
    given = np.asarray(samples)
    if given.ndim != 1:
        raise ValueError(f"samples must have one dimension, not the shape {given.shape}")
    if given.dtype.kind == "i":
        given = given / -float(np.iinfo(given.dtype).min)
    bounded: Samples = np.clip(np.nan_to_num(given), -1, 1).astype(np.float32)
    return bounded
