"""Decodes a recording with ffmpeg's libraries (PyAV) into a WAV file: a program, run in a process of its own.

A file that crashes or stalls a decoder, or has it take memory without end, ends that process and nothing else. The
exit code is `OK`, `TOO_LONG`, `TOO_MANY_SAMPLES` or `UNREADABLE`, with the reason as the last line of stderr; any other
means that this program itself failed. Only after `OK` the WAV file is complete.
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

#: ffmpeg's names of containers. Playlists and the like, which have it open other files and addresses, are left out.
_CONTAINERS = (
    "aac", "ac3", "aiff", "amr", "asf", "au", "avi", "caf", "eac3", "flac", "flv", "matroska", "mov", "mp3", "mpegts",
    "ogg", "w64", "wav", "webm", "wv",
)  # fmt: skip
#: And of decoders of sound: the pictures of a video are never decoded, however large they say they are.
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
    """The recording is not decoded, or no further; ``code`` is the exit code that says why."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def main() -> None:
    """Decode as the command line says, within its limits of memory and processor time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--seconds", type=float, required=True, help="of the recording, at most")
    parser.add_argument("--samples", type=float, required=True, help="over all channels, at most")
    parser.add_argument("--memory", type=int, required=True, help="bytes of address space")
    parser.add_argument("--cpu", type=int, required=True, help="seconds of processor time")
    options = parser.parse_args()
    os.nice(10)  # requests for speech have priority
    resource.setrlimit(resource.RLIMIT_AS, (options.memory, options.memory))
    # SIGXCPU at the first, so that SIGKILL tells of others.
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
    """Write 16-bit mono at the recording's own sample rate; `Refused` as soon as a limit is passed."""
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
    """Mixes frames of any form down to 16-bit mono at one sample rate. A damaged stream changes its form midway."""

    def __init__(self, sample_rate: int) -> None:
        self._sample_rate = sample_rate
        self._form: object = None
        self._resampler: Any = None

    def __call__(self, frame: av.AudioFrame | None) -> bytes:
        """The samples of a frame; of None, those that are left."""
        import av

        mixed = b""
        if frame is not None:
            form = (frame.format.name, frame.layout.name, frame.sample_rate)
            if form != self._form:
                mixed = self(None) if self._resampler else b""
                self._form, self._resampler = form, av.AudioResampler("s16", "mono", self._sample_rate)
            frame.pts = None  # samples follow each other, whatever times a damaged file gives them
        with _refusing():
            for each in self._resampler.resample(frame):
                mixed += bytes(each.planes[0])[: each.samples * 2]
        return mixed


def _frames(file: BinaryIO) -> Iterator[av.AudioFrame]:
    """What the decoder makes of the first track with sound; `Refused` if there is none, or it is damaged."""
    import av

    with _refusing(), av.open(file, options=_OPTIONS, metadata_errors="ignore") as container:
        if not container.streams.audio:
            raise Refused(UNREADABLE, "no sound in it")
        stream = container.streams.audio[0]
        # The list in the options is for those that look into the file; the decoder itself is opened here.
        codec = getattr(stream.codec_context, "name", "no known codec")  # no context where ffmpeg has no decoder
        if codec not in _CODECS:
            raise Refused(UNREADABLE, f"sound as {codec}")
        for frame in container.decode(stream):
            if frame.samples and frame.sample_rate:
                yield frame


@contextmanager
def _refusing() -> Iterator[None]:
    """A block in which errors of ffmpeg are the recording's."""
    import av

    try:
        yield
    except (av.FFmpegError, OSError, ValueError) as error:
        raise Refused(UNREADABLE, getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


if __name__ == "__main__":
    main()
