"""Converts recordings to a file that engines read and browsers play.

Most need no conversion. Formats of phones (AAC in m4a or mp4, Opus in webm, AMR in 3gp) are decoded to a WAV file by
`residency.web.speech.decode` in a separate process.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from ...cancellation import Cancellation, checkpoint, current
from ...errors import InvalidInput, about, pip_install
from ...sentences import Sentence
from . import decode
from .recordings import CONVERTING, DiskFull, Recordings

logger = logging.getLogger(__name__)

_MOST_SAMPLES_PER_S = 2 * 48_000
"""Maximum over all channels per permitted second: a small file with many channels can hold gigabytes."""

_PLAYED = {"WAV", "WAVEX", "FLAC", "MP3", "MPEG", "OGG"}
"""Formats that browsers play, by libsndfile's names."""

_MEMORY_BYTES = 1 << 30
"""Limit of a decoder's address space, including its libraries."""

_AT_A_TIME = 4
"""Maximum of concurrent conversions: a slow one does not block others, and cores are left for engines."""

_UNKNOWN_FRAMES = (1 << 63) - 1
"""libsndfile's number for a stream without a length, as this app sends FLAC of several sentences."""

_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""Signals that do not result from the decoder's own limits; the kernel sends SIGKILL when main memory is full."""

_LONGEST_S = 3600.0
"""Upper bound of a decoder's timeout."""

_CODEC = "sound as "
_DAMAGED = Sentence("it is not a recording, or it is damaged", "它不是录音，或已损坏")
#: Why a recording cannot be read, by message of ffmpeg or `decode`.
_REASONS = {
    "Invalid data found when processing input": _DAMAGED,
    "Invalid argument": _DAMAGED,
    "End of file": Sentence("it is cut off", "文件不完整"),
    "Input/output error": Sentence("it is cut off, or reading it failed", "文件不完整，或读取失败"),
    "Decoder not found": Sentence("its audio codec is not supported", "不支持其音频编码"),
    "Demuxer not found": Sentence("its file format is not supported", "不支持其文件格式"),
    "no sound in it": Sentence("it contains no sound", "其中没有声音"),
    "it needs too much memory": Sentence("reading it needs too much memory", "读取它需要过多内存"),
    "it takes too long to decode": Sentence("reading it takes too long", "读取它耗时过长"),
    "the decoder gave up on it": Sentence("the decoder failed on it", "读取它时解码器出错"),
}


@dataclass(frozen=True)
class Limits:
    """Limits of inputs: seconds of a recording, characters of a text, and of a target text."""

    audio_s: float = 600.0
    text: int = 5000
    target_text: int = 5000

    @property
    def samples(self) -> float:
        """Maximum of a recording's samples, over all channels."""
        return self.audio_s * _MOST_SAMPLES_PER_S


class Conversion:
    """Conversion into the folder of ``recordings``, with a subfolder for each recording. Thread-safe.

    Decides by a file's content, never by its name.
    """

    def __init__(self, recordings: Recordings, limits: Limits) -> None:
        self._recordings = recordings
        self._folder = Path(recordings.folder)
        self._limits = limits
        self._changed = threading.Condition()
        self._running = 0
        self._lock = threading.Lock()
        self._converting = weakref.WeakValueDictionary[Path, threading.Lock]()

    @about("recording")
    def readable(self, path: str | None) -> str:
        """Returns ``path``, or the path of a WAV file (16 bit, mono, same sample rate) if it needs conversion.

        Further calls for the same file return the same WAV file. Takes up to seconds; not for the event loop. A
        cancellation of the request in this context ends the conversion.

        Raises:
            InvalidInput: there is no recording, it cannot be read, or it exceeds the limits (decoding stops there).
            DiskFull: the limit of disk space leaves no room for the conversion.
            RequestStopped: the request was cancelled.
        """
        if not path:
            raise InvalidInput(
                "Input Audio is missing: upload or record a voice; the page has sample voices below it",
                "缺少输入音频：请上传或录制；页面上其下方有示例声音可用",
            )
        if not os.path.isfile(path):
            raise InvalidInput("The recording is gone: upload it again", "录音已不存在：请重新上传")
        header = _header(path)
        if header is not None:
            self._check(header)
        return self._converted(path) if _needs_converting(header) else path

    def _check(self, header: Any) -> None:
        if header.samplerate and header.frames / header.samplerate > self._limits.audio_s:
            raise self._too_long()
        if header.frames * header.channels > self._limits.samples:
            raise self._too_many_samples()

    def _converted(self, path: str) -> str:
        if not _has_decoder():
            raise InvalidInput(
                f"The server cannot read recordings of this format without the package av: install it with "
                f"{pip_install()} 'gpu-managed-tts[app]', or upload WAV, FLAC, MP3 or OGG",
                f"服务器缺少软件包 av，无法读取该格式的录音：请执行 {pip_install()} 'gpu-managed-tts[app]'，"
                "或上传 WAV、FLAC、MP3、OGG",
            )
        given = os.stat(path)
        key = f"{os.path.realpath(path)}\0{given.st_size}\0{given.st_mtime_ns}"
        target = self._folder / hashlib.sha256(key.encode()).hexdigest() / "recording.wav"
        with self._lock:
            of_this = self._converting.setdefault(target, threading.Lock())
        with of_this:
            if not target.exists():
                self._folder.mkdir(parents=True, exist_ok=True)
                with (
                    self._place(),
                    self._recordings.reserved(2 * self._limits.samples, 1) as most_bytes,
                    tempfile.TemporaryDirectory(prefix=CONVERTING, dir=self._folder) as workshop,
                ):
                    made = os.path.join(workshop, target.name)
                    self._decode(path, made, most_bytes / 2)
                    target.parent.mkdir(exist_ok=True)
                    os.replace(made, target)
        return str(target)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Waits until fewer than `_AT_A_TIME` conversions run, and counts one within this block.

        Raises `RequestStopped` if the request is cancelled before.
        """
        cancellation = current() or Cancellation()
        cancellation.on_cancel(self._wake)
        with self._changed:
            self._changed.wait_for(lambda: self._running < _AT_A_TIME or cancellation.cancelled)
            checkpoint()
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _decode(self, source: str, target: str, most_samples: float) -> None:
        most_s = self._limits.audio_s
        command = [sys.executable, "-m", decode.__name__, os.path.abspath(source), target]
        command += [f"--seconds={most_s}", f"--samples={most_samples}", f"--memory={_MEMORY_BYTES}"]
        command += [f"--cpu={min(20 + most_s / 10, _LONGEST_S):.0f}"]
        with subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as decoder:
            try:
                if cancellation := current():
                    cancellation.on_cancel(decoder.kill)
                log = decoder.communicate(timeout=min(60 + most_s, _LONGEST_S))[1]
            except subprocess.TimeoutExpired:
                raise _unreadable("it takes too long to decode") from None
            finally:
                decoder.kill()  # does nothing if it has ended
        checkpoint()
        self._check_end(decoder.returncode, log, most_samples)

    def _check_end(self, code: int, log: str, most_samples: float) -> None:
        """Raises the error of a decoder's exit code and stderr."""
        if code == decode.TOO_LONG:
            raise self._too_long()
        if code == decode.TOO_MANY_SAMPLES:
            raise self._too_many_samples() if most_samples >= self._limits.samples else DiskFull
        reason = next(reversed(log.splitlines()), "")
        if code == decode.UNREADABLE:
            raise _unreadable(reason)
        if -code in _FROM_OUTSIDE:
            raise InvalidInput(
                "The conversion of the recording was stopped on the server: try again; if that happens again, the "
                "server lacks memory",
                "服务器上的录音转换被中止：请重试；如再次出现，说明服务器内存不足",
            )
        if code < 0:
            raise _unreadable("the decoder gave up on it")
        if code:
            logger.error("The decoder failed:\n%s", log)
            raise InvalidInput(
                f"The server could not convert the recording ({reason}; more is in its log): upload WAV, FLAC, MP3 or "
                f"OGG",
                f"服务器无法转换该录音（{reason}；详见服务器日志）：请上传 WAV、FLAC、MP3 或 OGG",
            )

    def _too_long(self) -> InvalidInput:
        limit = f"{self._limits.audio_s:g}"
        return InvalidInput(
            f"The recording is longer than {limit} s: cut it, or start the app with a larger --max-audio",
            f"录音超过 {limit} 秒：请裁剪，或启动时调大 --max-audio",
        )

    def _too_many_samples(self) -> InvalidInput:
        limit = f"{self._limits.audio_s:g}"
        return InvalidInput(
            f"The recording holds more samples than {limit} s in stereo at 48 kHz: convert it to mono at 48 kHz, cut "
            f"it, or start the app with a larger --max-audio",
            f"录音的采样数超过 {limit} 秒 48 kHz 立体声：请转换为 48 kHz 单声道、裁剪，或启动时调大 --max-audio",
        )


def _unreadable(message: str) -> InvalidInput:
    """Returns the error for a message of the decoder, which is shown as it is if it is unknown."""
    reason = _REASONS.get(message) or Sentence.of(message)
    if message.startswith(_CODEC):
        codec = message.removeprefix(_CODEC)
        reason = Sentence(f"its audio codec {codec} is not supported", f"不支持其音频编码 {codec}")
    return InvalidInput(
        f"The recording cannot be read ({reason.en}): record it again, or convert it to WAV, FLAC, MP3, OGG or M4A",
        f"无法读取该录音（{reason.zh}）：请重新录制，或转换为 WAV、FLAC、MP3、OGG 或 M4A",
    )


def _header(path: str) -> Any:
    """Returns libsndfile's information about a file; None if it cannot read it, or its length is not in its header."""
    try:
        header = soundfile.info(path)
    except soundfile.LibsndfileError:
        return None
    return header if header.frames < _UNKNOWN_FRAMES else None


def _needs_converting(header: Any) -> bool:
    # Without the decoder, leaves formats unchanged that at least engines read.
    return header is None or (header.format not in _PLAYED and _has_decoder())


def _has_decoder() -> bool:
    return importlib.util.find_spec("av") is not None
