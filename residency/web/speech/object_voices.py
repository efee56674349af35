"""Stored voices in an object store, such as ``s3://bucket/voices``, through fsspec, for apps on many machines."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import soundfile

from ...errors import InvalidInput, ResidencyError
from ...marked_folders import marked_folder
from ...sentences import Sentence
from .voices import (
    MOST_BYTES,
    RECORDING,
    UnknownVoice,
    Voice,
    VoiceExists,
    VoiceNotStored,
    VoiceStore,
    VoicesUnreadable,
    checked_name,
    key,
    reason,
    sample_of,
    voice_of,
)

logger = logging.getLogger(__name__)

_SUFFIX = ".voice"
_FACTS_BYTES = 1 << 16
"""Maximum length of the first line of an object."""
_ANSWER_S, _TRANSFER_S = 10.0, 120.0
"""Maximum duration of a call of the store, and of one that transfers voices, where fsspec has a limit."""
_TRANSFERS = ("cat_file", "cat_ranges", "pipe_file")
_VERSION = ("ETag", "etag", "mtime", "LastModified", "last_modified", "modified", "created")
"""Fields that differ between two objects of one name; each kind of store has some of them."""

_Seen = tuple[Any, Voice | None]
"""What is known of an object: its version, and its voice, with a recording if that was copied; None: it is no voice."""


def voice_store(folder: str, check_audio: Callable[[str], object] = lambda path: None) -> VoiceStore:
    """Returns the voices of a folder, also as a ``file://`` URL, or of the URL of an object store.

    Raises `InvalidInput` for a URL that fsspec does not know, or for which a package is missing.
    """
    folder = folder.removeprefix("file://")
    return ObjectVoices(folder, check_audio) if "://" in folder else VoiceStore(folder, check_audio)


class ObjectVoices(VoiceStore):
    """Voices in an object store, with copies of the recordings that were asked for in a local folder.

    Each voice is one object: a line with its facts as JSON, then the WAV file. So it appears and disappears as a whole.
    The object's name is the voice's in lower case, so that one app stores it. Other objects are no voices, but can be
    deleted like them. Thread-safe, also for several apps with one store.
    """

    def __init__(self, url: str, check_audio: Callable[[str], object] = lambda path: None) -> None:
        import fsspec  # type: ignore[import-untyped]

        try:
            self._store, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InvalidInput(
                f"--voices-dir {url} cannot be used ({error}): give a folder, or install what fsspec needs for it",
                f"无法使用 --voices-dir {url}（{error}）：请指定目录，或安装 fsspec 所需的软件包",
            ) from error
        self._url = url
        self._bucket = self._root.partition("/")[0]
        """Empty in stores of folders, whose paths begin with a slash."""
        self._seen: dict[str, _Seen] = {}
        self._changing = threading.Lock()
        self._copying: dict[Any, threading.Lock] = {}
        """By object and version."""
        copies = ExitStack()
        super().__init__(copies.enter_context(marked_folder(tempfile.gettempdir(), "voices-")), check_audio)
        weakref.finalize(self, copies.close)  # also at exit

    def checked_new(self, name: str) -> str:
        name = checked_name(name)
        if sample_of(name) or self._info(name):
            raise VoiceExists(name)
        return name

    def sweep(self) -> None:
        """Logs a warning if the store cannot be read, from a thread of its own."""
        threading.Thread(target=self._warn, name="voices", daemon=True).start()

    def _warn(self) -> None:
        try:
            self._listed()
        except VoicesUnreadable as error:
            logger.warning("%s", error)

    def _names(self) -> tuple[str, ...]:
        return tuple(voice.name for voice in self.all())

    def _voices(self) -> list[Voice]:
        """Returns the stored voices, without recordings. Reads the first line of each new object."""
        before, there = dict(self._seen), {each["name"]: each for each in self._listed()}
        now = {name: seen for name, seen in before.items() if name in there and seen[0] == _version(there[name])}
        new = [name for name in there if name not in now]
        with self._asking():
            lines = self._call("cat_ranges", new, 0, _FACTS_BYTES, on_error="return")
            for name, line in zip(new, lines, strict=True):
                if isinstance(line, bytes):
                    now[name] = _version(there[name]), _parsed(line, there[name]["size"], name)
                elif not isinstance(line, FileNotFoundError):  # which was deleted meanwhile
                    raise line
        for name in before.keys() | now.keys():
            self._replace(name, before.get(name), now.get(name))
        return [voice for _, voice in now.values() if voice]

    def _found(self, name: str) -> Voice | None:
        while there := self._info(name):
            version = _version(there)
            with self._copying.setdefault((there["name"], version), threading.Lock()):
                seen = self._seen.get(there["name"])
                if seen and seen[0] == version and (seen[1] is None or os.path.isfile(seen[1].recording)):
                    return seen[1]
                self._copy(there, seen)
        return None

    def _copy(self, there: Mapping[str, Any], seen: _Seen | None) -> None:
        """Copies an object of which ``seen`` is known."""
        name, content, voice, kept = there["name"], b"", None, False
        with self._asking(), suppress(FileNotFoundError):  # deleted meanwhile
            if there["size"] <= MOST_BYTES:
                content = self._call("cat_file", name)
        handle, recording = tempfile.mkstemp(".wav", dir=self._folder)
        try:
            with open(handle, "wb") as file:
                file.write(content.partition(b"\n")[2])
            with suppress(soundfile.LibsndfileError):
                soundfile.info(recording)
                voice = _parsed(content, len(content), name, recording)
            kept = self._replace(name, seen, (_version(there), voice)) and voice is not None
        finally:
            if not kept:
                os.remove(recording)

    def _replace(self, name: str, before: _Seen | None, now: _Seen | None) -> bool:
        """Replaces what is known of an object, and deletes its copy; returns False if another thread did so before."""
        with self._changing:
            if self._seen.get(name) is not before:
                return False
            if before and before is not now:
                del self._seen[name]
                self._copying.pop((name, before[0]), None)
                if before[1] and before[1].recording:
                    Path(before[1].recording).unlink(missing_ok=True)
            if now:
                self._seen[name] = now
            return True

    def _sizes(self) -> list[int]:
        return [each["size"] for each in self._listed()]

    def _keep(self, unfinished: Path, facts: Mapping[str, Any]) -> str:
        name, path, sound = facts["name"], self._object(facts["name"]), (unfinished / RECORDING).read_bytes()
        line = json.dumps({**facts, "bytes": len(sound)}, ensure_ascii=False).encode() + b"\n"
        if len(line) > _FACTS_BYTES:
            raise InvalidInput(
                "The words of the recording are too long for a voice: shorten them",
                "录音文本过长，无法保存为声音：请缩短",
                "prompt_text",
            )
        with self._storing():
            if not self._bucket:
                self._call("makedirs", self._root, exist_ok=True)
            try:
                self._call("pipe_file", path, line + sound, mode="create")
            except FileExistsError:
                raise VoiceExists(name) from None
            except Exception:
                with suppress(Exception):  # a part of it may be there
                    if (line + sound).startswith(self._call("cat_file", path)):
                        self._call("rm_file", path)
                raise
        return ""

    def _delete(self, name: str) -> Voice:
        there, voices = self._info(name), {key(voice.name): voice for voice in self._voices()}
        if there is None:
            raise UnknownVoice(name, self._names())
        with self._storing(), suppress(FileNotFoundError):  # another app deleted it meanwhile
            self._call("rm_file", there["name"])
        self._replace(there["name"], self._seen.get(there["name"]), None)
        return voices.get(key(name)) or Voice(checked_name(name), "", "", True, 0)

    def _object(self, name: str) -> str:
        return f"{self._root}/{key(name)}{_SUFFIX}"

    def _info(self, name: str) -> dict[str, Any] | None:
        """Returns the store's facts of the object of a voice; None if there is none."""
        with self._asking(), suppress(FileNotFoundError, InvalidInput):
            path = self._object(checked_name(name))
            self._store.invalidate_cache(self._root)
            found: dict[str, Any] = self._call("info", path)
            return found if found["type"] == "file" else None
        return None

    def _listed(self) -> list[dict[str, Any]]:
        """Returns the store's facts of each object that may be a voice."""
        with self._asking(), suppress(FileNotFoundError):  # no voice was stored yet
            self._store.invalidate_cache(self._root)
            objects = self._call("ls", self._root, detail=True)
            return [each for each in objects if each["name"].endswith(_SUFFIX) and each["size"]]
        try:
            with suppress(VoicesUnreadable), self._asking():  # maybe for want of permission
                if self._bucket:
                    self._call("info", self._bucket)
        except FileNotFoundError:
            no_bucket = Sentence(f"there is no bucket {self._bucket}", f"存储桶 {self._bucket} 不存在")
            raise VoicesUnreadable(self._url, no_bucket) from None
        return []

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Raises `VoicesUnreadable` for errors of the store, of which each has its own, except FileNotFoundError."""
        try:
            yield
        except (FileNotFoundError, ResidencyError):
            raise
        except Exception as error:
            raise VoicesUnreadable(self._url, reason(error)) from error

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """Raises `VoiceNotStored` for errors of the store."""
        try:
            yield
        except ResidencyError:
            raise
        except Exception as error:
            raise VoiceNotStored.of(self._url, error) from error

    def _call(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        within_s = _TRANSFER_S if method in _TRANSFERS else _ANSWER_S
        if getattr(self._store, "async_impl", False):
            keywords["timeout"] = within_s
        try:
            return getattr(self._store, method)(*arguments, **keywords)
        except asyncio.TimeoutError as error:
            raise TimeoutError(f"no answer within {within_s:g} s") from error


def _version(there: Mapping[str, Any]) -> Any:
    changed = next((there[field] for field in _VERSION if there.get(field)), None)
    return getattr(changed, "timestamp", lambda: changed)(), there["size"]  # MemoryFileSystem has both forms


def _parsed(content: bytes, size: int, path: str, recording: str = "") -> Voice | None:
    """Returns the voice of an object of ``size`` bytes by its begin; None if it is none."""
    line = content.partition(b"\n")[0]
    try:
        facts = json.loads(line)
        voice = voice_of(facts, checked_name(facts["name"]), recording)
        is_voice = path.endswith(f"/{key(voice.name)}{_SUFFIX}") and size == len(line) + 1 + facts["bytes"]
    except Exception:  # whatever is wrong with it
        return None
    return voice if is_voice else None
