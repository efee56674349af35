"""Voices in an object store, as several apps see them: with fsspec's stores in memory and in a folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import soundfile
from recordings import write_tone

from residency.errors import InvalidInput
from residency.web.speech.object_voices import ObjectVoices, voice_store
from residency.web.speech.voices import UnknownVoice, VoiceExists, VoiceNotStored, VoiceStore, VoicesUnreadable


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield f"memory://voices-{tmp_path.name}" if request.param == "memory" else f"file://{tmp_path}/voices"
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


@pytest.fixture
def recording(tmp_path: Path) -> str:
    return str(write_tone(tmp_path / "tone.wav"))


def names(store: VoiceStore) -> list[str]:
    return [voice.name for voice in store.all() if voice.stored]


def test_a_voice_of_one_app_is_there_for_the_others(url: str, recording: str, tmp_path: Path) -> None:
    mine, others = voice_store(url), voice_store(url)
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
    monkeypatch.setattr(store._store, "ls", failing)
    assert store.get("HIGH").name == "high"
    for read in (store.all, lambda: store.get("Ada"), lambda: store.remove("Ada")):
        with pytest.raises(VoicesUnreadable, match=r"no network.*high and low can be used"):
            read()
    monkeypatch.undo()
    new = ObjectVoices(url)
    monkeypatch.setattr(new._store, "cat_file", failing)
    with pytest.raises(VoicesUnreadable, match="no network"):
        new.all()
    monkeypatch.undo()
    assert store.get("Ada").text == "words"


@pytest.mark.parametrize("slow", ["ls", "cat_file"])
def test_a_slow_answer_of_the_store_delays_its_own_request_only(
    url: str, recording: str, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    mine, others = ObjectVoices(url), ObjectVoices(url)
    mine.add("Ada", "words", recording)
    reached, goes_on, plain = threading.Event(), threading.Event(), getattr(others._store, slow)

    def late(*arguments: Any, **keywords: Any) -> Any:
        answer = plain(*arguments, **keywords)
        if not reached.is_set():
            reached.set()
            assert goes_on.wait(60)
        return answer

    monkeypatch.setattr(others._store, slow, late)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(others.get, "Ada")
        try:
            assert reached.wait(60)
            assert others.get("Ada").text == "words"
            others.remove("Ada")
            others.add("Ada", "new words", recording)
        finally:
            goes_on.set()
        assert first.result(60).text == "new words", "the store has changed since the first answer"
    assert names(others) == ["Ada"]
    assert Path(others.get("Ada").recording).is_file()


def failing(*arguments: object, **keywords: object) -> None:
    raise OSError("no network")


def test_an_object_that_is_no_voice_is_no_voice(url: str, recording: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectVoices(url)
    store.add("Ada", "words", recording)
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/Bad.voice.zip", b"no archive")
    fs.pipe_file(f"{root}/..%2Fout.voice.zip", fs.cat_file(f"{root}/Ada.voice.zip"))
    fs.pipe_file(f"{root}/notes.txt", b"notes")
    other = ObjectVoices(url)
    assert names(other) == ["Ada"]
    monkeypatch.setattr(other._store, "cat_file", failing)
    assert names(other) == ["Ada"], "it was read once"


@pytest.mark.parametrize("wrong", ["nonsense://voices", "s3://bucket/voices"])
def test_a_store_that_cannot_be_used_is_refused(wrong: str) -> None:
    with pytest.raises(InvalidInput, match="--voices-dir"):
        voice_store(wrong)


def test_a_folder_is_a_folder(tmp_path: Path) -> None:
    assert type(voice_store(str(tmp_path))) is VoiceStore
