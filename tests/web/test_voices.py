from __future__ import annotations

import errno
import os
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from recordings import write_tone

from residency.errors import InvalidInput
from residency.web.speech import voices as module
from residency.web.speech.voices import UnknownVoice, VoiceExists, VoiceNotStored, VoicesFull, VoiceStore, checked_name


@pytest.fixture
def store(tmp_path: Path) -> VoiceStore:
    return VoiceStore(tmp_path / "kept" / "voices")


def files(store: VoiceStore) -> list[str]:
    folder = Path(store._folder)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


def test_two_voices_ship_and_cannot_be_deleted(store: VoiceStore) -> None:
    assert [voice.name for voice in store.all()] == ["high", "low"]
    assert all(os.path.isfile(voice.recording) and voice.text for voice in store.all())
    with pytest.raises(InvalidInput, match="ships with the app"):
        store.remove("high")


def test_a_stored_voice_outlives_the_app(store: VoiceStore, recording: str) -> None:
    store.add("Ada", "the words", recording)
    again = VoiceStore(store._folder).get("ada")
    assert (again.name, again.text, again.stored) == ("Ada", "the words", True)
    with wave.open(again.recording) as sound:
        assert (sound.getnchannels(), sound.getsampwidth()) == (1, 2)
    before, _ = soundfile.read(recording)
    after, _ = soundfile.read(again.recording)
    assert np.abs(before - after).max() < 1e-3


def test_stereo_becomes_mono(store: VoiceStore, tmp_path: Path) -> None:
    both = np.stack([np.full(2000, 0.5), np.full(2000, -0.1)], axis=1)
    soundfile.write(tmp_path / "stereo.flac", both, 16000)
    samples, sample_rate = soundfile.read(store.add("both", "words", str(tmp_path / "stereo.flac")).recording)
    assert (samples.shape, sample_rate) == ((2000,), 16000)
    assert np.allclose(samples, 0.2, atol=1e-3)


def test_a_deleted_voice_is_gone(store: VoiceStore, recording: str) -> None:
    store.add("Ada", "words", recording)
    assert store.remove("ADA").name == "Ada"
    assert files(store) == []
    with pytest.raises(UnknownVoice, match="high, low"):
        store.get("Ada")


@pytest.mark.parametrize("name", ["Ada", "ada", "  ADA ", "high", "LOW"])
def test_a_name_is_given_once(store: VoiceStore, recording: str, name: str) -> None:
    store.add("Ada", "words", recording)
    with pytest.raises(VoiceExists):
        store.add(name, "words", recording)
    assert len(files(store)) == 3


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../up", "a/b", "a\\b", "/etc/passwd", ".hidden", "a\0b", "a\nb\x1b", "x" * 65, "%2e%2e",
     "a:b", "-rf", "a.", "声" * 70, "~", "CON|", "\ud800", "a\u202eb", None],
)  # fmt: skip
def test_such_a_name_is_refused_and_writes_nothing(store: VoiceStore, recording: str, name: str | None) -> None:
    with pytest.raises(InvalidInput, match="1 to 64 letters"):
        store.add(name, "words", recording)  # type: ignore[arg-type]
    assert files(store) == []


@pytest.mark.parametrize("name", ["Ada", "小明", "हिन्दी", "O'Neil Jr", "voice-1_b.2", "é", "7"])
def test_names_of_every_script_are_allowed(store: VoiceStore, recording: str, name: str) -> None:
    store.add(name, "words", recording)
    assert store.get(name).name == name


def test_spaces_and_forms_of_a_letter_are_unified() -> None:
    assert checked_name("  Ada   Lovelace ") == "Ada Lovelace"
    assert checked_name("e\u0301") == "\u00e9"


@pytest.mark.parametrize("name", ["nobody", "../../etc/passwd", "\0", "x" * 10_000])
def test_an_unknown_voice_is_named_with_those_that_exist(store: VoiceStore, name: str) -> None:
    with pytest.raises(UnknownVoice, match="choose one of high, low") as caught:
        store.get(name)
    assert len(str(caught.value)) < 1000


def test_a_recording_without_sound_is_refused(store: VoiceStore, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    with pytest.raises(InvalidInput, match="no sound"):
        store.add("Ada", "words", str(tmp_path / "empty.wav"))
    assert files(store) == []


def test_a_recording_that_the_engine_cannot_take_is_refused(tmp_path: Path, recording: str) -> None:
    def refuse(path: str) -> None:
        raise InvalidInput("too long for its context", "过长")

    with pytest.raises(InvalidInput, match="too long") as caught:
        VoiceStore(tmp_path / "voices", refuse).add("Ada", "words", recording)
    assert caught.value.field == "recording"


@pytest.mark.parametrize("call", ["rename", "mkdtemp", "write"])
def test_on_a_full_disk_nothing_is_left(
    store: VoiceStore, recording: str, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = {"rename": module.os, "mkdtemp": module.tempfile, "write": module.wave}[call]
    monkeypatch.setattr(owner, "open" if call == "write" else call, full)
    with pytest.raises(VoiceNotStored, match="No space left"):
        store.add("Ada", "words", recording)
    monkeypatch.undo()
    assert files(store) == []
    store.add("Ada", "words", recording)


def test_a_folder_that_cannot_be_written(tmp_path: Path, recording: str) -> None:
    (tmp_path / "file").touch()
    store = VoiceStore(tmp_path / "file" / "voices")
    assert len(store.all()) == 2
    with pytest.raises(VoiceNotStored, match="--voices-dir"):
        store.add("Ada", "words", recording)


@pytest.mark.parametrize("limit", ["MOST_BYTES", "_MOST_VOICES"])
def test_no_more_are_stored_than_the_limits(
    store: VoiceStore, recording: str, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    size = 44 + 2 * soundfile.info(recording).frames
    monkeypatch.setattr(module, limit, 2 * size if limit == "MOST_BYTES" else 2)
    store.add("Ada", "words", recording)
    store.add("Bob", "words", recording)
    with pytest.raises(VoicesFull, match="delete some"):
        store.add("Eve", "words", recording)
    assert len(files(store)) == 6
    store.remove("Ada")
    store.add("Eve", "words", recording)


def test_only_the_voice_asked_for_is_read(store: VoiceStore, recording: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Ada", "Bob", "Eve"):
        store.add(name, f"words of {name}", recording)
    read: list[str] = []
    loads = module.json.loads
    monkeypatch.setattr(module.json, "loads", lambda text: read.append(text) or loads(text))
    assert store.get("bob").text == "words of Bob"
    assert store.get("high").text
    with pytest.raises(UnknownVoice, match="high, low, Ada, Bob, Eve"):
        store.get("nobody")
    assert len(read) == 1


def test_an_error_names_some_of_many_voices() -> None:
    assert len(str(UnknownVoice("x", tuple(f"voice {number}" for number in range(1000))))) < 1000


@pytest.mark.parametrize("facts", ["", "{", "[]", '{"text": "x"}', '{"text": "x", "created": "soon"}'])
def test_folders_that_are_no_voices_are_passed_over(store: VoiceStore, recording: str, facts: str) -> None:
    kept = store.add("Ada", "words", recording)
    Path(kept.recording).with_name("voice.json").write_text(facts)
    (Path(store._folder) / "notes.txt").touch()
    assert [voice.name for voice in store.all()] == ["high", "low"]


def test_a_copy_outlives_the_voice(store: VoiceStore, recording: str, tmp_path: Path) -> None:
    voice = store.add("Ada", "words", recording)
    with store.copied(voice, tmp_path) as copy:
        store.remove("Ada")
        assert soundfile.info(copy).frames
    assert not os.path.exists(copy)
    with pytest.raises(UnknownVoice), store.copied(voice, tmp_path):
        pass


def test_what_killed_apps_left_is_deleted_later(store: VoiceStore, recording: str) -> None:
    store.add("Ada", "words", recording)
    old, young = Path(store._folder, ".new-old"), Path(store._folder, ".gone-young")
    for folder in (old, young):
        folder.mkdir()
        write_tone(folder / "recording.wav")
    os.utime(old, (0, 0))
    store.sweep()
    assert not old.exists()
    assert young.exists()
    assert store.get("Ada")
