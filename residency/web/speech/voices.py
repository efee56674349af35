"""Stored voices: recordings with their transcripts, by name, in a folder that outlives the app."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import threading
import time
import unicodedata
import wave
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ...errors import InvalidInput, ResidencyError, about
from ...sentences import Sentence
from ...units import readable_bytes
from .recordings import DISK_IS_FULL, UNDER_WAY
from .sample_voices import FOLDER, VOICES

RECORDING, FACTS = "recording.wav", "voice.json"
"""Files of a stored voice."""
_HIDDEN = "."
"""First character of the names of folders that are being written or deleted."""
_MOST_VOICES, MOST_BYTES = 1000, 2_000_000_000
_NAMED = 20
"""Maximum of voices that an error names."""
_LONGEST_NAME, _LONGEST_NAME_BYTES = 64, 200
_PUNCTUATION = frozenset(" -_.'")
_BLOCK_FRAMES = 1 << 16


class UnknownVoice(InvalidInput):
    """No voice has this name."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        some, more = known[:_NAMED], len(known) > _NAMED
        super().__init__(
            f"No voice is called {name!r}: choose one of {', '.join(some)}{', ...' * more}, or store it with POST "
            f"/v1/audio/voices",
            f"没有名为 {name!r} 的声音：可用 {'、'.join(some)}{'等' * more}，或通过 POST /v1/audio/voices 保存",
            "voice",
        )
        self._arguments = (name, known)


class VoiceExists(InvalidInput):
    """A voice of this name is stored already."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"A voice called {name!r} exists already: choose another name, or delete that voice first",
            f"已有名为 {name!r} 的声音：请换一个名称，或先删除该声音",
            "voice_name",
        )
        self._arguments = (name,)


class VoiceNotStored(ResidencyError):
    """The folder or object store of the voices cannot be changed; ``is_full``: for want of disk space."""

    def __init__(self, folder: str, reason: str, is_full: bool = False) -> None:
        full, access = (
            ("free space there", "清理该处空间"),
            ("check that the app may write there", "检查应用能否写入该处"),
        )
        what_next = full if is_full else access
        super().__init__(
            f"The voices in {folder} were not changed ({reason}): {what_next[0]}, or start the app with another "
            f"--voices-dir.",
            f"{folder} 中的声音未作任何更改（{reason}）：请{what_next[1]}，或在启动时用 --voices-dir 指定其他目录。",
            folder,
            reason,
            is_full,
        )
        self.is_full = is_full

    @classmethod
    def of(cls, folder: str, error: Exception) -> VoiceNotStored:
        is_full = isinstance(error, OSError) and error.errno in DISK_IS_FULL
        return cls(folder, reason(error), is_full)


def reason(error: Exception) -> str:
    """Returns a text for an error of a disk or an object store."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class VoicesUnreadable(ResidencyError):
    """The object store of the voices does not answer, or has no such bucket. ``reason`` may be a `Sentence`."""

    def __init__(self, url: str, reason: str) -> None:
        why = Sentence.of(reason)
        super().__init__(
            f"The stored voices in {url} cannot be read ({why.en}): check that the app can reach them, and try again. "
            f"The voices {' and '.join(VOICES)} can be used meanwhile.",
            f"无法读取 {url} 中保存的声音（{why.zh}）：请检查应用能否访问该处，然后重试。"
            f"其间可使用声音 {'、'.join(VOICES)}。",
            url,
            reason,
        )


class VoicesFull(ResidencyError):
    """As many voices are stored as the app keeps, or as many bytes."""

    en = f"{_MOST_VOICES:,} voices, or {readable_bytes(MOST_BYTES)}, are stored, which is the limit: delete some first."
    zh = f"保存的声音已达上限（{_MOST_VOICES} 个或 {readable_bytes(MOST_BYTES)}）：请先删除不需要的声音。"


@dataclass(frozen=True)
class Voice:
    """A voice for speech.

    Attributes:
        name: identifies it, without regard to case.
        text: the words that are said in the recording.
        recording: path of an audio file that engines read; empty if the voice is in an object store, and not by `get`.
        stored: False for the voices that ship with the app, which cannot be deleted.
        created: seconds since 1970; 0 for those that ship.
    """

    name: str
    text: str
    recording: str
    stored: bool
    created: int


class VoiceStore:
    """The voices of a folder and those that ship with the app. Thread-safe, also for several apps with one folder.

    Each voice is a folder of its name with a WAV file (16 bit, mono) and its facts as JSON. It appears and disappears
    as a whole, by renaming. ``check_audio`` raises `InvalidInput` for a recording that the engine cannot take.
    """

    def __init__(self, folder: str | Path, check_audio: Callable[[str], object] = lambda path: None) -> None:
        self._folder = Path(folder)
        self._check_audio = check_audio
        self._lock = threading.Lock()

    def all(self) -> list[Voice]:
        """Returns all voices: those that ship, then the stored ones by name."""
        return [*_samples(), *sorted(self._voices(), key=lambda voice: voice.name.casefold())]

    def get(self, name: str) -> Voice:
        """Returns a voice; raises `UnknownVoice`."""
        voice = sample_of(name) or self._found(name)
        if voice is None:
            raise UnknownVoice(name[:_LONGEST_NAME], self._names())
        return voice

    def add(self, name: str, text: str, recording: str) -> Voice:
        """Stores a copy of a recording that `Conversion.readable` returned, with its transcript.

        Raises `InvalidInput` for an unsuitable name or recording, `VoiceExists`, `VoicesFull`, and `VoiceNotStored`;
        then nothing is left of it.
        """
        name = checked_name(name)
        with about("recording"):
            self._check_audio(recording)
        created = int(time.time())
        with self._lock:
            self.checked_new(name)
            try:
                sizes = self._sizes()
                if len(sizes) >= _MOST_VOICES or sum(sizes) + 2 * soundfile.info(recording).frames > MOST_BYTES:
                    raise VoicesFull
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(
                    prefix=f"{_HIDDEN}new-", dir=self._folder, ignore_cleanup_errors=True
                ) as unfinished:
                    _write_wav(recording, os.path.join(unfinished, RECORDING))
                    stored = self._keep(Path(unfinished), {"name": name, "text": text, "created": created})
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and self._folder.is_dir():
                    raise VoiceExists(name) from None  # another app stored it meanwhile
                raise VoiceNotStored.of(str(self._folder), error) from error
        return Voice(name, text, stored, True, created)

    def checked_new(self, name: str) -> str:
        """Returns the normal form of a new voice's name; raises `InvalidInput` and `VoiceExists`."""
        name = checked_name(name)
        if any(key(other) == key(name) for other in self._names()):
            raise VoiceExists(name)
        return name

    def remove(self, name: str) -> Voice:
        """Deletes a stored voice and returns it; raises `UnknownVoice`, and `InvalidInput` for one that ships."""
        if sample := sample_of(name):
            raise InvalidInput(
                f"The voice {sample.name!r} ships with the app and cannot be deleted",
                f"声音 {sample.name!r} 随应用提供，无法删除",
            )
        with self._lock:
            return self._delete(name)

    @contextmanager
    def copied(self, voice: Voice, folder: str | Path) -> Iterator[str]:
        """Yields the path of a copy of a stored recording, which outlives the voice; deletes it at the end."""
        if not voice.stored:
            yield voice.recording
            return
        prefix = f"{UNDER_WAY}-voice-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder, ignore_cleanup_errors=True) as workshop:
            yield self.copy(voice, workshop)

    def copy(self, voice: Voice, folder: str | Path) -> str:
        """Copies the recording into a folder; returns its path. Raises `UnknownVoice` if it was deleted meanwhile."""
        try:
            return shutil.copy(voice.recording, str(folder))
        except FileNotFoundError:
            raise UnknownVoice(voice.name, self._names()) from None

    def sweep(self) -> None:
        """Deletes what apps that were killed left unfinished. For the start of the app."""
        for left in self._folder.glob(f"{_HIDDEN}*-*"):
            if left.name.startswith((f"{_HIDDEN}new-", f"{_HIDDEN}gone-")) and _age_s(left) > 3600:
                shutil.rmtree(left, ignore_errors=True)

    def _names(self) -> tuple[str, ...]:
        return (*VOICES, *sorted((folder.name for folder in self._stored()), key=str.casefold))

    def _voices(self) -> Iterable[Voice]:
        return filter(None, map(_read, self._stored()))

    def _found(self, name: str) -> Voice | None:
        """Returns a stored voice; None if there is none."""
        found = (_read(folder) for folder in self._stored() if key(folder.name) == key(name))
        return next(filter(None, found), None)

    def _sizes(self) -> list[int]:
        """Returns the bytes of each stored voice."""
        return [os.path.getsize(folder / RECORDING) for folder in self._stored()]

    def _keep(self, unfinished: Path, facts: Mapping[str, Any]) -> str:
        """Stores the recording of a folder; returns the path of the stored one. May move the folder."""
        Path(unfinished, FACTS).write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
        folder = self._folder / facts["name"]
        os.rename(unfinished, folder)
        return str(folder / RECORDING)

    def _delete(self, name: str) -> Voice:
        voice = self.get(name)
        try:
            doomed = tempfile.mkdtemp(prefix=f"{_HIDDEN}gone-", dir=self._folder)
            try:
                os.rename(Path(voice.recording).parent, doomed)
            finally:
                shutil.rmtree(doomed, ignore_errors=True)  # the rest of a voice is no voice: see `sweep`
        except FileNotFoundError:  # another app deleted it meanwhile
            raise UnknownVoice(name, self._names()) from None
        except OSError as error:
            raise VoiceNotStored.of(str(self._folder), error) from error
        return voice

    def _stored(self) -> Iterator[Path]:
        """Yields the folders of the stored voices."""
        with suppress(OSError):  # no folder: no voices
            for folder in self._folder.iterdir():
                if not folder.name.startswith(_HIDDEN) and (folder / RECORDING).is_file():
                    yield folder


def _samples() -> list[Voice]:
    return [Voice(name, sample.says, str(FOLDER / sample.file), False, 0) for name, sample in VOICES.items()]


def sample_of(name: str) -> Voice | None:
    """Returns a voice that ships with the app, without reading files; None if none has this name."""
    return next((voice for voice in _samples() if key(voice.name) == key(name)), None)


def _read(folder: Path) -> Voice | None:
    """Returns a stored voice; None if it is none, or was deleted meanwhile."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        return voice_of(facts, folder.name, str(folder / RECORDING))
    except Exception:  # whatever is wrong with it
        return None


def voice_of(facts: Mapping[str, Any], name: str, recording: str) -> Voice:
    """Returns the stored voice of its facts; raises an exception of any kind if they are none."""
    text = str(facts["text"])
    text.encode()  # raises for what JSON cannot have in an answer
    return Voice(name, text, recording, True, int(facts["created"]))


def checked_name(name: str | None) -> str:
    """Returns a voice's name in its normal form; raises `InvalidInput` for one that is no safe file name."""
    name = unicodedata.normalize("NFC", " ".join((name or "").split()))
    safe = bool(name) and all(character in _PUNCTUATION or _is_letter(character) for character in name)
    if not safe or not _is_letter(name[0]) or name[-1] in ". " or len(name) > _LONGEST_NAME:
        raise _bad_name()
    if len(name.encode()) > _LONGEST_NAME_BYTES:
        raise _bad_name()
    return name


def _bad_name() -> InvalidInput:
    return InvalidInput(
        f"Give the voice a name of 1 to {_LONGEST_NAME} letters, digits, spaces, - _ . and ', that begins with a "
        f"letter or digit",
        f"声音名称需为 1 到 {_LONGEST_NAME} 个字符，可用文字、数字、空格和 - _ . '，并以文字或数字开头",
        "voice_name",
    )


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"


def key(name: str) -> str:
    """Returns what is equal for two spellings of one voice's name."""
    return unicodedata.normalize("NFC", " ".join(name.split())).casefold()


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _write_wav(source: str, target: str) -> None:
    """Writes a recording as 16-bit mono; raises `InvalidInput` if it has no samples, or cannot be read."""
    frames = 0
    # By `wave`, whose errors are those of the disk.
    with soundfile.SoundFile(source) as recording, wave.open(target, "wb") as sound:
        sound.setparams((1, 2, recording.samplerate, 0, "NONE", "not compressed"))
        for block in recording.blocks(_BLOCK_FRAMES, dtype="float32", always_2d=True):
            mono = np.clip(np.nan_to_num(np.mean(block, axis=1)), -1, 1)
            sound.writeframes((mono * 32767).astype("<i2").tobytes())
            frames += len(block)
    if not frames:
        raise InvalidInput("The recording has no sound: record it again", "录音中没有声音：请重新录制", "recording")
