"""Voices in an object store, as several apps see them: with fsspec's stores in memory and in a folder, and with S3.

S3 is moto's server; without ``moto[server]`` and ``s3fs`` these tests are skipped.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest
import soundfile
from app_process import wait_until
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from recordings import write_tone

from residency.errors import InvalidInput
from residency.web.speech import object_voices as module
from residency.web.speech.object_voices import ObjectVoices, voice_store
from residency.web.speech.voices import UnknownVoice, VoiceExists, VoiceNotStored, VoiceStore, VoicesUnreadable

_S3 = pytest.mark.skipif(not (find_spec("moto") and find_spec("s3fs")), reason="needs moto[server] and s3fs")


@pytest.fixture(params=["memory", "file", pytest.param("s3", marks=_S3)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "memory":
        yield f"memory://voices-{tmp_path.name}"
        fsspec.filesystem("memory").store.clear()
    elif request.param == "file":
        yield f"file://{tmp_path}/voices"
    else:
        request.getfixturevalue("s3")
        fsspec.filesystem("s3").mkdir(f"bucket-{os.path.basename(tmp_path).replace('_', '-')}"[:60])
        yield f"s3://bucket-{os.path.basename(tmp_path).replace('_', '-')}"[:65] + "/voices"


@pytest.fixture(scope="session")
def s3() -> Iterator[None]:
    """Serves S3 at the address that the environment gives to s3fs."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield
    server.stop()


class Buckets(MemoryFileSystem):
    """Objects in buckets, as in S3."""

    protocol = "buckets"
    root_marker = ""
    store: dict[str, Any] = {}  # noqa: RUF012 - as in its base
    there: set[str] = set()  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("buckets://").strip("/")

    def ls(self, path: str, detail: bool = True, **keywords: Any) -> Any:
        self._check(path)
        return super().ls(path, detail=detail, **keywords)

    def info(self, path: str, **keywords: Any) -> Any:
        self._check(path)
        return super().info(path, **keywords) if "/" in path else {"name": path, "type": "directory", "size": 0}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        raise PermissionError("no permission for CreateBucket")

    def _check(self, path: str) -> None:
        if path.partition("/")[0] not in self.there:
            raise FileNotFoundError(path)


class Silent(AsyncFileSystem):  # type: ignore[misc]
    """Never answers."""

    protocol = "silent"

    async def _ls(self, path: str, detail: bool = True, **keywords: Any) -> Any:
        await asyncio.Event().wait()

    async def _info(self, path: str, **keywords: Any) -> Any:
        await asyncio.Event().wait()


fsspec.register_implementation("buckets", Buckets, clobber=True)
fsspec.register_implementation("silent", Silent, clobber=True)


@pytest.fixture
def bucket() -> Iterator[str]:
    """Yields the URL of a folder in a bucket."""
    Buckets.there.add("bucket")
    yield "buckets://bucket/voices"
    Buckets.there.clear()
    Buckets.store.clear()


@pytest.fixture
def recording(tmp_path: Path) -> str:
    return str(write_tone(tmp_path / "tone.wav"))


def names(store: VoiceStore) -> list[str]:
    return [voice.name for voice in store.all() if voice.stored]


def test_a_voice_of_one_app_is_there_for_the_others(url: str, recording: str, tmp_path: Path) -> None:
    mine, others = ObjectVoices(url), ObjectVoices(url)
    assert names(others) == []
    mine.add("Ada 艾达", "its words", recording)
    voice = others.get("ada 艾达")
    assert (voice.name, voice.text) == ("Ada 艾达", "its words")
    with others.copied(voice, tmp_path) as path:
        assert soundfile.info(path).frames == soundfile.info(recording).frames
    others.remove("Ada 艾达")
    assert names(mine) == []
    with pytest.raises(UnknownVoice):
        mine.get("Ada 艾达")


def test_a_voice_that_was_replaced_is_read_again(url: str, recording: str) -> None:
    mine, others = ObjectVoices(url), ObjectVoices(url)
    mine.add("Ada", "first", recording)
    assert others.get("Ada").text == "first"
    mine.remove("Ada")
    mine.add("Ada", "the second text", recording)
    assert others.get("Ada").text == "the second text"


def test_of_two_apps_that_store_one_name_one_succeeds(url: str, recording: str) -> None:
    stores = [ObjectVoices(url) for _ in range(4)]
    assert [names(store) for store in stores] == [[]] * 4

    def add(store: ObjectVoices) -> bool:
        try:
            store.add("Ada", "words", recording)
            return True
        except VoiceExists:
            return False

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(add, stores)) == 1
    assert [names(store) for store in stores] == [["Ada"]] * 4


def test_a_store_that_fails_changes_nothing(recording: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = ObjectVoices(f"file://{tmp_path}/voices")
    monkeypatch.setattr(store._store, "pipe_file", failing)
    with pytest.raises(VoiceNotStored, match="no network"):
        store.add("Ada", "words", recording)
    monkeypatch.undo()
    assert names(store) == []
    store.add("Ada", "words", recording)
    monkeypatch.setattr(store._store, "rm_file", failing)
    with pytest.raises(VoiceNotStored, match="no network"):
        store.remove("Ada")
    monkeypatch.undo()
    assert names(store) == ["Ada"]


def test_a_store_that_does_not_answer_leaves_the_voices_that_ship(
    url: str, recording: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectVoices(url)
    store.add("Ada", "words", recording)
    for call in ("ls", "info"):
        monkeypatch.setattr(store._store, call, failing)
    assert store.get("HIGH").name == "high"
    for read in (store.all, lambda: store.get("Ada"), lambda: store.remove("Ada")):
        with pytest.raises(VoicesUnreadable, match=r"no network.*high and low can be used"):
            read()
    monkeypatch.undo()
    new = ObjectVoices(url)
    for call in ("cat_file", "cat_ranges"):
        monkeypatch.setattr(new._store, call, failing)
    for read in (new.all, lambda: new.get("Ada")):
        with pytest.raises(VoicesUnreadable, match="no network"):
            read()
    monkeypatch.undo()
    assert store.get("Ada").text == "words"


@pytest.mark.parametrize("slow", ["info", "ls", "cat_file"])
def test_a_slow_answer_of_the_store_delays_its_own_request_only(
    url: str, recording: str, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    mine, others = ObjectVoices(url), ObjectVoices(url)
    mine.add("Ada", "words", recording)
    mine.add("Bob", "words", recording)
    reached, goes_on, plain = threading.Event(), threading.Event(), getattr(others._store, slow)

    def late(*arguments: Any, **keywords: Any) -> Any:
        answer = plain(*arguments, **keywords)
        if not reached.is_set():
            reached.set()
            assert goes_on.wait(60)
        return answer

    monkeypatch.setattr(others._store, slow, late)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(others.all if slow == "ls" else lambda: [others.get("Ada")])
        try:
            assert reached.wait(60)
            assert others.get("Bob").text == "words"
            if slow != "cat_file":
                assert others.get("Ada").text == "words"
            others.remove("Ada")
            others.add("Ada", "new words", recording)
        finally:
            goes_on.set()
        answer = {voice.name: voice.text for voice in first.result(60)}
        assert slow == "ls" or answer == {"Ada": "new words"}, "the store has changed since the first answer"
    assert names(others) == ["Ada", "Bob"]
    assert others.get("Ada").text == "new words"
    assert Path(others.get("Ada").recording).is_file()


def test_only_the_voice_asked_for_is_copied_and_once(
    url: str, recording: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine, others = ObjectVoices(url), ObjectVoices(url)
    for number in range(5):
        mine.add(f"Voice {number}", "words", recording)
    copied: list[str] = []
    plain = others._store.cat_file

    def counted(path: str, *arguments: Any, **keywords: Any) -> Any:
        copied.append(path.rpartition("/")[2])
        return plain(path, *arguments, **keywords)

    monkeypatch.setattr(others._store, "cat_file", counted)
    with ThreadPoolExecutor(4) as pool:
        assert {voice.text for voice in pool.map(others.get, ["voice 3"] * 8)} == {"words"}
    assert copied == ["voice 3.voice"]
    copied.clear()
    assert len(names(others)) == 5
    assert others.get("Voice 3").recording == others.get("VOICE 3").recording
    assert set(copied) <= {f"voice {number}.voice" for number in (0, 1, 2, 4)}, "their first lines"
    os.remove(others.get("Voice 3").recording)
    with others.copied(others.get("Voice 3"), tmp_path) as copy:
        assert soundfile.info(copy).frames


def test_a_list_reads_the_begins_of_objects_only(bucket: str, recording: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, others = ObjectVoices(bucket), ObjectVoices(bucket)
    mine.add("Ada", "words", recording)
    monkeypatch.setattr(module, "_FACTS_BYTES", 200)
    read: list[int] = []
    plain = others._store.cat_file

    def counted(*arguments: Any, **keywords: Any) -> Any:
        answer = plain(*arguments, **keywords)
        read.append(len(answer))
        return answer

    monkeypatch.setattr(others._store, "cat_file", counted)
    assert [names(others) for _ in range(2)] == [["Ada"]] * 2
    assert read == [200]


def test_copies_of_voices_that_are_gone_are_deleted(url: str, recording: str, tmp_path: Path) -> None:
    mine, others = ObjectVoices(url), ObjectVoices(url)
    mine.add("Ada", "words", recording)
    mine.add("Bob", "words", recording)
    voice, bob = others.get("Ada"), others.get("Bob")
    mine.remove("Ada")
    with others.copied(voice, tmp_path) as copy:
        assert soundfile.info(copy).frames, "it was deleted while this app copies it"
        assert names(others) == ["Bob"]
        assert Path(bob.recording).is_file()
        assert not Path(voice.recording).exists()
        assert soundfile.info(copy).frames
    with pytest.raises(UnknownVoice, match="high, low, Bob"), others.copied(voice, tmp_path):
        pass
    mine.remove("Bob")
    mine.add("Bob", "new words", recording)
    assert others.get("Bob").text == "new words"
    assert not Path(bob.recording).exists()


def test_names_that_differ_in_case_only_are_one(url: str, recording: str) -> None:
    stores = [ObjectVoices(url) for _ in range(2)]
    ready = threading.Barrier(2)

    def add(store: ObjectVoices, name: str) -> bool:
        plain = store._store.pipe_file

        def together(*arguments: Any, **keywords: Any) -> Any:
            ready.wait(60)
            with one_at_a_time:
                return plain(*arguments, **keywords)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "_store", Proxy(store._store, together))
            try:
                store.add(name, f"words of {name}", recording)
                return True
            except VoiceExists:
                return False

    one_at_a_time = threading.Lock()  # fsspec's stores of files are not atomic
    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(add, stores, ["Ada", "ada"])) == [False, True]
    (name,) = names(stores[0])
    assert stores[1].get("ADA").text == f"words of {name}"
    assert stores[1].remove("aDA").name == name
    assert names(stores[0]) == []


class Proxy:
    """A store with another ``pipe_file``, for one app."""

    def __init__(self, store: Any, pipe_file: Any) -> None:
        self._store, self.pipe_file = store, pipe_file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_what_a_failed_write_has_left_is_deleted(url: str, recording: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectVoices(url)
    plain = store._store.pipe_file

    def full(path: str, content: bytes, **keywords: Any) -> None:
        plain(path, content[:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store._store, "pipe_file", full)
    with pytest.raises(VoiceNotStored, match="No space left") as caught:
        store.add("Ada", "words", recording)
    assert caught.value.is_full
    monkeypatch.undo()
    assert store._sizes() == []
    other = ObjectVoices(url)

    def late(path: str, content: bytes, **keywords: Any) -> None:
        other.add("Ada", "their words", recording)
        raise OSError("connection lost")

    monkeypatch.setattr(store, "_store", Proxy(store._store, late))
    with pytest.raises(VoiceNotStored, match="connection lost"):
        store.add("Ada", "words", recording)
    assert store.get("Ada").text == "their words"


def failing(*arguments: object, **keywords: object) -> None:
    raise OSError("no network")


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("voice.json", "{}")
    return content.getvalue()


def facts(**other: str) -> bytes:
    """Returns the object of a voice called Bad without a recording, with ``other`` facts as JSON."""
    values = {"name": '"Bad"', "text": '"words"', "created": "1", "bytes": "0", **other}
    return ("{" + ", ".join(f'"{field}": {value}' for field, value in values.items()) + "}\n").encode()


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"no voice", b"\xff" * 100_000, zipped(), b"[" * 60_000 + b"\n", b"[]\n", b"{}\n", facts(name="1"),
     facts(name='"Ada"'), facts(name='"../bad"'), facts(text='"\\ud800"'), facts(created="Infinity"),
     facts(created="9" * 5000), facts(bytes='"0"'), facts(bytes="1"), facts(), facts(bytes="-1")[:-1],
     facts(bytes="9") + b"no sound!"],
    ids=lambda content: repr(content[:60]),
)  # fmt: skip
def test_an_object_that_is_no_voice_is_no_voice(url: str, recording: str, content: bytes) -> None:
    store, other = ObjectVoices(url), ObjectVoices(url)
    store.add("Ada", "words", recording)
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/bad.voice", content)
    fs.pipe_file(f"{root}/..%2Fout.voice", fs.cat_file(f"{root}/ada.voice"))
    fs.pipe_file(f"{root}/notes.txt", b"notes")
    with pytest.raises(UnknownVoice, match=r"high, low, Ada, or store it|high, low, Ada, Bad, or"):
        other.get("Bad")
    assert names(other) == ["Ada"]
    with pytest.raises(UnknownVoice, match="high, low, Ada, or store it"):
        other.get("Bad")
    assert other.get("Ada").text == "words"
    with pytest.raises(VoiceExists):
        other.add("Bad", "words", recording)
    assert other.remove("bad").name.casefold() == "bad"
    other.add("Bad", "good words", recording)
    assert store.get("Bad").text == "good words"


def test_a_damaged_voice_is_read_once(url: str, recording: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectVoices(url)
    store.add("Ada", "words", recording)
    fs, root = fsspec.core.url_to_fs(url)
    content = bytearray(fs.cat_file(f"{root}/ada.voice"))
    content[content.index(b"RIFF")] ^= 1
    fs.pipe_file(f"{root}/ada.voice", bytes(content))
    other = ObjectVoices(url)
    with pytest.raises(UnknownVoice):
        other.get("Ada")
    monkeypatch.setattr(other._store, "cat_file", failing)
    with pytest.raises(UnknownVoice, match="high, low, or"):
        other.get("Ada")
    assert names(other) == []


def test_an_object_that_is_too_large_is_not_copied(url: str, recording: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = ObjectVoices(url), ObjectVoices(url)
    store.add("Ada", "words", recording)
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    monkeypatch.setattr(other._store, "cat_file", failing)
    with pytest.raises(UnknownVoice):
        other.get("Ada")


def test_words_that_are_too_long_are_refused(url: str, recording: str) -> None:
    store = ObjectVoices(url)
    with pytest.raises(InvalidInput, match="too long") as caught:
        store.add("Ada", "长" * 22_000, recording)
    assert caught.value.field == "prompt_text"
    store.add("Ada", "长" * 21_000, recording)
    assert len(ObjectVoices(url).all()[-1].text) == 21_000


def test_no_bucket_is_created(bucket: str, recording: str, caplog: pytest.LogCaptureFixture) -> None:
    store = ObjectVoices(bucket)
    assert names(store) == []
    store.sweep()
    store.add("Ada", "words", recording)
    assert names(store) == ["Ada"]
    wrong = ObjectVoices("buckets://typo/voices")
    for call in (
        wrong.all, lambda: wrong.get("Ada"), lambda: wrong.remove("Ada"), lambda: wrong.add("Ada", "words", recording),
    ):  # fmt: skip
        with pytest.raises(VoicesUnreadable, match=r"no bucket typo.*存储桶 typo 不存在"):
            call()
    assert caplog.text == ""
    wrong.sweep()
    wait_until(lambda: "no bucket typo" in caplog.text)


def test_a_bucket_that_may_not_be_looked_at_is_there(
    bucket: str, recording: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectVoices(bucket)
    plain = store._store.info

    def limited(path: str, **keywords: Any) -> Any:
        if "/" not in path:
            raise PermissionError("no permission for HeadBucket")
        return plain(path, **keywords)

    monkeypatch.setattr(store._store, "info", limited)
    assert names(store) == []
    store.add("Ada", "words", recording)
    assert names(store) == ["Ada"]


def test_a_missing_bucket_of_s3(request: pytest.FixtureRequest, recording: str) -> None:
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    request.getfixturevalue("s3")
    store = ObjectVoices("s3://no-such-bucket/voices")
    for call in (store.all, lambda: store.get("Ada"), lambda: store.add("Ada", "words", recording)):
        with pytest.raises(VoicesUnreadable, match="no bucket no-such-bucket"):
            call()
    assert not fsspec.filesystem("s3").exists("no-such-bucket")


def test_a_store_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ANSWER_S", 0.01)
    store = ObjectVoices("silent://bucket/voices")
    for call in (store.all, lambda: store.get("Ada")):
        with pytest.raises(VoicesUnreadable, match=r"no answer within 0\.01 s"):
            call()


@pytest.mark.parametrize("wrong", ["nonsense://voices", "s3://bucket/voices"])
def test_a_store_that_cannot_be_used_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InvalidInput, match="--voices-dir"):
        voice_store(wrong)


def test_a_folder_is_a_folder(tmp_path: Path) -> None:
    for folder in (str(tmp_path), f"file://{tmp_path}"):
        store = voice_store(folder)
        assert type(store) is VoiceStore
        assert store._folder == tmp_path
