"""Decodes a recording with ffmpeg's libraries (PyAV) into a WAV file, as a program in a separate process.

A file that crashes or stalls the decoder, or exhausts its memory, ends only that process. The exit code is `OK`,
`TOO_LONG`, `TOO_MANY_SAMPLES` or `UNREADABLE`, with the reason as the last line of stderr; any other code is a failure
of this program itself. The WAV file is complete only after `OK`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import sys
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import av

OK, TOO_LONG, TOO_MANY_SAMPLES, UNREADABLE = 0, 10, 11, 12

#: ffmpeg's names of containers, without playlists and others that can open further files and URLs.
_CONTAINERS = (
    "aac", "ac3", "aiff", "amr", "asf", "au", "avi", "caf", "eac3", "flac", "flv", "matroska", "mov", "mp3", "mpegts",
    "ogg", "w64", "wav", "webm", "wv",
)  # fmt: skip
#: ffmpeg's names of audio decoders. Video frames, which can be huge, are never decoded.
_CODECS = (
    "aac", "aac_latm", "ac3", "alac", "amrnb", "amrwb", "eac3", "flac", "gsm", "gsm_ms", "libopencore_amrnb",
    "libopencore_amrwb", "libopus", "mp2", "mp2float", "mp3", "mp3float", "opus", "speex", "vorbis", "wavpack",
    "wmalossless", "wmapro", "wmav1", "wmav2", "wmavoice", "adpcm_ima_qt", "adpcm_ima_wav", "adpcm_ms", "pcm_alaw",
    "pcm_mulaw", "pcm_f32be", "pcm_f32le", "pcm_f64be", "pcm_f64le", "pcm_s16be", "pcm_s16le", "pcm_s24be",
    "pcm_s24le", "pcm_s32be", "pcm_s32le", "pcm_s8", "pcm_u8",
)  # fmt: skip
_OPTIONS = {
    "format_whitelist": ",".join(_CONTAINERS),
    "codec_whitelist": ",".join(_CODECS),
    "protocol_whitelist": "none",
}


class Refused(Exception):
    """Error that ends the decoding of a recording; ``code`` is the exit code of the program."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def main() -> None:
    """Decodes by the command line, within its limits of memory and CPU time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--seconds", type=float, required=True, help="of the recording, at most")
    parser.add_argument("--samples", type=float, required=True, help="over all channels, at most")
    parser.add_argument("--memory", type=int, required=True, help="bytes of address space")
    parser.add_argument("--cpu", type=int, required=True, help="seconds of processor time")
    options = parser.parse_args()
    os.nice(10)  # speech requests have priority
    resource.setrlimit(resource.RLIMIT_AS, (options.memory, options.memory))
    # The soft limit sends SIGXCPU first, so that SIGKILL indicates another cause.
    resource.setrlimit(resource.RLIMIT_CPU, (options.cpu, options.cpu + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        decode(options.source, options.target, options.seconds, options.samples)
    except Refused as refused:
        print(refused, file=sys.stderr)
        sys.exit(refused.code)
    except MemoryError:
        print("it needs too much memory", file=sys.stderr)
        sys.exit(UNREADABLE)


def decode(source: str, target: str, most_s: float, most_samples: float) -> None:
    """Writes 16-bit mono at the recording's own sample rate; raises `Refused` as soon as a limit is exceeded."""
    seconds = 0.0
    samples = 0
    with open(source, "rb") as file:
        frames = _frames(file)
        first = next(frames, None)
        if first is None:
            raise Refused(UNREADABLE, "no sound in it")
        mono = _Mono(first.sample_rate)
        with wave.open(target, "wb") as sound:
            sound.setparams((1, 2, first.sample_rate, 0, "NONE", "not compressed"))
            for frame in itertools.chain([first], frames):
                seconds += frame.samples / frame.sample_rate
                samples += frame.samples * frame.layout.nb_channels
                if seconds > most_s:
                    raise Refused(TOO_LONG, "too long")
                if samples > most_samples:
                    raise Refused(TOO_MANY_SAMPLES, "too many samples")
                sound.writeframesraw(mono(frame))
            sound.writeframes(mono(None))


class _Mono:
    """A mixer of frames to 16-bit mono at one sample rate, also if a damaged stream changes its format midway."""

    def __init__(self, sample_rate: int) -> None:
        self._sample_rate = sample_rate
        self._form: object = None
        self._resampler: Any = None

    def __call__(self, frame: av.AudioFrame | None) -> bytes:
        """Returns the samples of a frame; for None, the buffered rest."""
        import av

        mixed = b""
        if frame is not None:
            form = (frame.format.name, frame.layout.name, frame.sample_rate)
            if form != self._form:
                mixed = self(None) if self._resampler else b""
                self._form, self._resampler = form, av.AudioResampler("s16", "mono", self._sample_rate)
            frame.pts = None  # ignores timestamps, which may be wrong in a damaged file
        with _refusing():
            for each in self._resampler.resample(frame):
                mixed += bytes(each.planes[0])[: each.samples * 2]
        return mixed


def _frames(file: BinaryIO) -> Iterator[av.AudioFrame]:
    """Yields the frames of the first audio track; raises `Refused` if there is none, or it is damaged."""
    import av

    with _refusing(), av.open(file, options=_OPTIONS, metadata_errors="ignore") as container:
        if not container.streams.audio:
            raise Refused(UNREADABLE, "no sound in it")
        stream = container.streams.audio[0]
        # The list in the options applies only to probing; the decoder itself is opened here.
        codec = getattr(stream.codec_context, "name", "no known codec")  # no context where ffmpeg has no decoder
        if codec not in _CODECS:
            raise Refused(UNREADABLE, f"sound as {codec}")
        for frame in container.decode(stream):
            if frame.samples and frame.sample_rate:
                yield frame


@contextmanager
def _refusing() -> Iterator[None]:
    """Converts errors of ffmpeg within this block to `Refused`."""
    import av

    try:
        yield
    except (av.FFmpegError, OSError, ValueError) as error:
        raise Refused(UNREADABLE, getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


if __name__ == "__main__":
    main()
