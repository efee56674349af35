"""Stored voices in an object store, such as ``s3://bucket/voices``, through fsspec, for apps on many machines."""

from __future__ import annotations

import io
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from ...errors import InvalidInput
from .voices import FACTS, RECORDING, Voice, VoiceExists, VoiceNotStored, VoiceStore, checked_name

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
        self._copies = tempfile.TemporaryDirectory(prefix="voices-", ignore_cleanup_errors=True)
        super().__init__(self._copies.name, check_audio)

    def add(self, name: str, text: str, recording: str) -> Voice:
        with self._changing:
            voice = super().add(name, text, recording)
            folder = Path(voice.recording).parent
            try:
                self._store.makedirs(self._root, exist_ok=True)
                self._store.pipe_file(self._object(voice.name), _zipped(folder), mode="create")
                self._copied[voice.name] = self._version(self._store.info(self._object(voice.name)))
            except FileExistsError:
                shutil.rmtree(folder, ignore_errors=True)
                raise VoiceExists(name) from None
            except Exception as error:  # each store has errors of its own
                shutil.rmtree(folder, ignore_errors=True)
                raise VoiceNotStored(self._url, str(error)) from error
            return voice

    def remove(self, name: str) -> Voice:
        with self._changing:
            voice = super().remove(name)
            try:
                self._store.rm_file(self._object(voice.name))
            except FileNotFoundError:  # another app deleted it meanwhile
                pass
            except Exception as error:
                self._copied.pop(voice.name, None)  # it is still there
                raise VoiceNotStored(self._url, str(error)) from error
            return voice

    def _stored(self) -> Iterator[Path]:
        with self._changing:
            self._compare()
            folders = list(super()._stored())
        return iter(folders)

    def _compare(self) -> None:
        """Makes the local copies those of the store."""
        self._store.invalidate_cache(self._root)
        try:
            objects = self._store.ls(self._root, detail=True)
        except FileNotFoundError:  # no voice was stored yet
            objects = []
        except Exception as error:
            raise VoiceNotStored(self._url, str(error)) from error
        names = {unquote(each["name"].rpartition("/")[2].removesuffix(_SUFFIX)): each for each in objects
                 if each["name"].endswith(_SUFFIX)}  # fmt: skip
        names = {name: each for name, each in names.items() if _is_name(name)}
        there = {name: self._version(each) for name, each in names.items()}
        for name in [name for name, version in self._copied.items() if there.get(name) != version]:
            shutil.rmtree(self._folder / name, ignore_errors=True)
            del self._copied[name]
        for name in there.keys() - self._copied.keys():
            with tempfile.TemporaryDirectory(prefix=".new-", dir=self._folder, ignore_cleanup_errors=True) as new:
                try:
                    with zipfile.ZipFile(io.BytesIO(self._store.cat_file(names[name]["name"]))) as archive:
                        for file in (RECORDING, FACTS):
                            Path(new, file).write_bytes(archive.read(file))
                except (FileNotFoundError, zipfile.BadZipFile, KeyError):  # deleted meanwhile, or no voice
                    continue
                shutil.copytree(new, self._folder / name)
            self._copied[name] = there[name]

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
