"""Stored voices in an object store, such as ``s3://bucket/voices``, through fsspec, for apps on many machines."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from ...errors import InvalidInput
from ...marked_folders import marked_folder
from .voices import FACTS, RECORDING, Voice, VoiceExists, VoiceNotStored, VoiceStore, VoicesUnreadable, checked_name

_SUFFIX = ".voice.zip"


def voice_store(folder: str, check_audio: Callable[[str], object] = lambda path: None) -> VoiceStore:
    """Returns the voices of a folder, or of the URL of an object store.

    Raises `InvalidInput` for a URL that fsspec does not know, or for which a package is missing.
    """
    return ObjectVoices(folder, check_audio) if "://" in folder else VoiceStore(folder, check_audio)


class ObjectVoices(VoiceStore):
    """Voices in an object store, with copies in a local folder that are compared with it before each use.

    Each voice is one object, a ZIP file with the recording and its facts, so that it appears and disappears as a whole.
    Thread-safe, also for several apps with one store.
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
        self._changing = threading.RLock()
        self._copied: dict[str, Any] = {}
        """Version of the object by the name of its voice, also of objects that are no voices."""
        self._changes = 0
        copies = ExitStack()
        super().__init__(copies.enter_context(marked_folder(tempfile.gettempdir(), "voices-")), check_audio)
        weakref.finalize(self, copies.close)  # also at exit

    def add(self, name: str, text: str, recording: str) -> Voice:
        with self._changing:
            voice = super().add(name, text, recording)
            folder = Path(voice.recording).parent
            try:
                self._store.makedirs(self._root, exist_ok=True)
                self._store.pipe_file(self._object(voice.name), _zipped(folder), mode="create")
                self._copied[voice.name] = self._version(self._store.info(self._object(voice.name)))
                self._changes += 1
            except FileExistsError:
                shutil.rmtree(folder, ignore_errors=True)
                raise VoiceExists(name) from None
            except Exception as error:  # each store has errors of its own
                shutil.rmtree(folder, ignore_errors=True)
                raise VoiceNotStored.of(self._url, error) from error
            return voice

    def remove(self, name: str) -> Voice:
        with self._changing:
            voice = super().remove(name)
            del self._copied[voice.name]  # if it stays in the store, it is copied again
            try:
                self._store.rm_file(self._object(voice.name))
            except FileNotFoundError:  # another app deleted it meanwhile
                pass
            except Exception as error:
                raise VoiceNotStored.of(self._url, error) from error
            self._changes += 1
            return voice

    def _stored(self) -> Iterator[Path]:
        self._compare()
        return (folder for folder in super()._stored() if folder.name in self._copied)

    def _compare(self) -> None:
        """Makes the local copies those of the store. Other threads wait for each other only to change the copies."""
        while True:
            changes = self._changes
            objects = self._listed()
            there, copied = {name: self._version(each) for name, each in objects.items()}, dict(self._copied)
            if there == copied:
                return
            with tempfile.TemporaryDirectory(prefix=".new-", dir=self._folder, ignore_cleanup_errors=True) as new:
                different = [name for name, version in there.items() if copied.get(name) != version]
                fetched = [name for name in different if self._fetched(objects[name]["name"], Path(new, name))]
                with self._changing:
                    if changes != self._changes:  # by another thread, after this one has listed
                        continue
                    for name in [name for name, version in copied.items() if there.get(name) != version]:
                        shutil.rmtree(self._folder / name, ignore_errors=True)
                        del self._copied[name]
                    for name in fetched:
                        with suppress(FileNotFoundError):  # it is no voice
                            os.rename(Path(new, name), self._folder / name)
                        self._copied[name] = there[name]
                    self._changes += 1
                    return

    def _listed(self) -> dict[str, dict[str, Any]]:
        """Returns the facts of the store's objects by the name of their voice."""
        self._store.invalidate_cache(self._root)
        try:
            objects = self._store.ls(self._root, detail=True)
        except FileNotFoundError:  # no voice was stored yet
            objects = []
        except Exception as error:  # each store has errors of its own
            raise VoicesUnreadable(self._url, str(error)) from error
        names = {unquote(each["name"].rpartition("/")[2].removesuffix(_SUFFIX)): each for each in objects
                 if each["name"].endswith(_SUFFIX)}  # fmt: skip
        return {name: each for name, each in names.items() if _is_name(name)}

    def _fetched(self, path: str, folder: Path) -> bool:
        """Copies a voice into a new folder, nothing if the object is no voice; returns False if there is no object."""
        try:
            content = self._store.cat_file(path)
        except FileNotFoundError:  # deleted meanwhile
            return False
        except Exception as error:
            raise VoicesUnreadable(self._url, str(error)) from error
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                files = {file: archive.read(file) for file in (RECORDING, FACTS)}
        except (zipfile.BadZipFile, KeyError):
            return True
        folder.mkdir()
        for file, data in files.items():
            Path(folder, file).write_bytes(data)
        return True

    def _object(self, name: str) -> str:
        return f"{self._root}/{quote(name)}{_SUFFIX}"

    @staticmethod
    def _version(facts: dict[str, Any]) -> Any:
        """Returns what differs between two objects of one name; the stores have different fields."""
        return [facts.get(field) for field in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created", "size")]


def _is_name(name: str) -> bool:
    try:
        return checked_name(name) == name
    except InvalidInput:
        return False


def _zipped(folder: Path) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in (RECORDING, FACTS):
            archive.write(folder / file, file)
    return content.getvalue()
