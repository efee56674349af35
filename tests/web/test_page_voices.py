from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from starlette.requests import Request

from app import EditxTab
from residency.errors import InvalidInput
from residency.web.speech import sample_voices
from residency.web.speech.voices import Voice, VoicesUnreadable
from residency.web.ui import voices as module

SKIPPED = gr.skip()
LOCAL = ("127.0.0.1", 5000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "recordings"


@pytest.fixture
def tab(engine: Any, folder: Path, tmp_path: Path) -> EditxTab:
    return EditxTab(Namespace(tmp_dir=str(folder), voices_dir=str(tmp_path / "voices")), tts_engine=engine)


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> str:
    """All events are those of one session."""
    monkeypatch.setattr(module, "session", lambda: "mine")
    return "mine"


def sent_from(client: tuple[str, int]) -> gr.Request:
    """The request of an event, from a page at this address."""
    headers = [(b"host", b"127.0.0.1:7860")]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers, "client": client}
    return gr.Request(Request(scope))


def save(tab: EditxTab, name: str, recording: str | None, text: str = "words", client: Any = LOCAL) -> list[Any]:
    return tab.voice_choice.save(sent_from(client), name, recording, text)


def messages(updates: list[Any]) -> dict[str, str]:
    """The messages among the updates of a press, by field."""
    return {field: said for field, said in zip(module._ABOUT, updates[-len(module._ABOUT) :], strict=True) if said}


def names(tab: EditxTab) -> list[str]:
    return [value for _, value in tab.voice_choice.refresh(None)[1]]


def test_a_store_that_does_not_answer_leaves_the_list_as_it_is(tab: EditxTab, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[Voice]:
        raise VoicesUnreadable("s3://bucket/voices", "no answer within 10 s")

    monkeypatch.setattr(tab.voices, "all", fail)
    assert tab.voice_choice.refresh(None) == (SKIPPED, SKIPPED)


class TestChoosing:
    def test_a_voice_fills_in_a_copy_of_the_recording_and_its_words(
        self, tab: EditxTab, recording: str, folder: Path, mine: str
    ) -> None:
        voice = tab.voices.add("Ada", "her words", recording)
        text, path, *target, chosen, delete, message = tab.voice_choice.choose("Ada", "")
        assert (text, chosen, message) == ("her words", "Ada", "")
        assert target == [SKIPPED, SKIPPED], "only samples have a sentence to begin with"
        assert delete["visible"]
        assert Path(path).is_relative_to(folder)
        assert Path(path).read_bytes() == Path(voice.recording).read_bytes()
        assert tab.recordings.owns(mine, path)

    @pytest.mark.parametrize(("target", "filled"), [("", sample_voices.TARGET_TEXT), ("mine", SKIPPED)])
    def test_a_sample_fills_in_a_target_text_where_none_is(self, tab: EditxTab, target: str, filled: Any) -> None:
        text, path, to_say, *_, delete, message = tab.voice_choice.choose("low", target)
        assert (text, to_say, message) == (sample_voices.VOICES["low"].says, filled, "")
        assert Path(path).read_bytes() == (sample_voices.FOLDER / "low.flac").read_bytes()
        assert not delete["visible"]

    def test_the_copy_outlives_the_voice(self, tab: EditxTab, recording: str) -> None:
        tab.voices.add("Ada", "words", recording)
        path = tab.voice_choice.choose("Ada", "")[1]
        tab.voices.remove("Ada")
        assert os.path.isfile(path)

    def test_one_that_was_deleted_meanwhile_leaves_the_inputs_as_they_are(self, tab: EditxTab, folder: Path) -> None:
        *inputs, chosen, delete, message = tab.voice_choice.choose("Ada", "")
        assert inputs == [SKIPPED] * 4
        assert chosen is None
        assert not delete["visible"]
        assert message.field == "voice"
        assert "Ada" in message
        assert not list(folder.glob("*"))

    def test_one_whose_recording_vanishes_while_it_is_copied(
        self, tab: EditxTab, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tab.voices, "get", lambda name: Voice("Ada", "words", "/nowhere/recording.wav", True, 0))
        assert "No voice is called" in tab.voice_choice.choose("Ada", "")[-1]
        assert not list(folder.glob("*")), "no empty folder is left"

    def test_a_full_disk_is_said(self, engine: Any, folder: Path, tmp_path: Path) -> None:
        arguments = Namespace(tmp_dir=str(folder), voices_dir=str(tmp_path), max_disk=10)
        message = EditxTab(arguments, tts_engine=engine).voice_choice.choose("low", "")[-1]
        assert "limit for recordings" in message
        assert not list(folder.glob("*"))

    def test_a_list_that_is_closed_without_a_choice_changes_nothing(self, tab: EditxTab) -> None:
        assert tab.voice_choice.choose(None, "") == [SKIPPED] * 7


def test_a_list_that_has_not_changed_is_left_alone(tab: EditxTab, recording: str) -> None:
    _, choices = tab.voice_choice.refresh(None)
    assert tab.voice_choice.refresh(choices) == (SKIPPED, SKIPPED)
    tab.voices.add("Ada", "words", recording)
    update, choices = tab.voice_choice.refresh(choices)
    assert update["choices"] == choices
    assert choices[-1] == ("Ada", "Ada")


class TestSaving:
    def test_the_recording_and_its_words_are_kept(self, tab: EditxTab, recording: str) -> None:
        listed, choices, delete, name, *_ = updates = save(tab, " Ada ", recording, " her words ")
        assert (listed["value"], delete["visible"], name) == ("Ada", True, "")
        assert "Ada" in messages(updates)["voice_name"]
        assert "alert" not in messages(updates)["voice_name"]
        assert tab.voices.get("Ada").text == "her words"
        assert names(tab) == ["high", "low", "Ada"]
        assert listed["choices"] == choices
        assert dict(map(reversed, listed["choices"]))["high"] == "示例：较高的声音 / Sample: a higher voice"

    def test_one_without_a_name_gets_a_number(self, tab: EditxTab, recording: str) -> None:
        save(tab, "voice 2", recording)
        for _ in range(2):
            save(tab, "  ", recording)
        assert names(tab) == ["high", "low", "Voice 1", "voice 2", "Voice 3"]

    @pytest.mark.parametrize(
        ("change", "field", "said"),
        [
            ({"name": "../up"}, "voice_name", "letters, digits"),
            ({"name": "HIGH"}, "voice_name", "exists already"),
            ({"text": " "}, "prompt_text", "Prompt Text is empty"),
            ({"recording": None}, "recording", "Input Audio is missing"),
            ({"recording": __file__}, "recording", "cannot be read"),
            ({"client": ("192.168.0.9", 5000)}, "voice_name", "allowed only from this machine"),
        ],
    )
    def test_what_cannot_be_is_said_beside_its_control(
        self, tab: EditxTab, recording: str, change: dict[str, Any], field: str, said: str
    ) -> None:
        updates = save(tab, **{"name": "Ada", "recording": recording, **change})
        assert updates[:4] == [SKIPPED] * 4
        assert list(messages(updates)) == [field]
        assert said in messages(updates)[field]
        assert "alert" in messages(updates)[field]
        assert names(tab) == ["high", "low"]

    def test_what_the_engine_cannot_take_is_not_kept(
        self, engine: Any, folder: Path, tmp_path: Path, recording: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def check_audio(path: str) -> None:
            raise InvalidInput("the recording is too long", "录音过长")

        monkeypatch.setattr(engine, "check_audio", check_audio, raising=False)
        arguments = Namespace(tmp_dir=str(folder), voices_dir=str(tmp_path / "voices"))
        tab = EditxTab(arguments, tts_engine=engine)
        assert "too long" in messages(save(tab, "Ada", recording))["recording"]

    def test_a_folder_that_cannot_be_written(self, engine: Any, folder: Path, recording: str) -> None:
        tab = EditxTab(Namespace(tmp_dir=str(folder), voices_dir=recording), tts_engine=engine)
        assert "--voices-dir" in messages(save(tab, "Ada", recording))["voice_name"]

    def test_names_are_shown_as_they_are(self, tab: EditxTab) -> None:
        assert "&lt;b&gt;" in tab.voice_choice.choose("<b>", "")[-1]


class TestDeleting:
    def test_a_stored_voice(self, tab: EditxTab, recording: str) -> None:
        save(tab, "Ada", recording)
        listed, _, delete, *_ = updates = tab.voice_choice.delete(sent_from(LOCAL), "Ada")
        assert (listed["value"], delete["visible"]) == (None, False)
        assert "deleted" in messages(updates)["voice"]
        assert names(tab) == ["high", "low"]

    @pytest.mark.parametrize(
        ("name", "client", "said"),
        [
            ("high", LOCAL, "ships with the app"),
            ("Bob", LOCAL, "No voice is called"),
            ("Ada", ("192.168.0.9", 5000), "allowed only from this machine"),
        ],
    )
    def test_what_cannot_be_deleted(self, tab: EditxTab, recording: str, name: str, client: Any, said: str) -> None:
        save(tab, "Ada", recording)
        updates = tab.voice_choice.delete(sent_from(client), name)
        assert said in messages(updates)["voice"]
        assert names(tab) == ["high", "low", "Ada"]

    def test_one_that_the_user_does_not_confirm(self, tab: EditxTab, recording: str) -> None:
        save(tab, "Ada", recording)
        assert tab.voice_choice.delete(sent_from(LOCAL), None) == [SKIPPED] * 8
        assert names(tab) == ["high", "low", "Ada"]


def test_no_event_of_the_voices_waits_in_the_queue_or_can_be_called_by_programs(tab: EditxTab) -> None:
    with gr.Blocks() as blocks:
        tab.register_components()
        tab.register_events()
    choice = tab.voice_choice
    ours = [
        each for each in blocks.fns.values() if each.fn in (choice.choose, choice.save, choice.delete, choice.refresh)
    ]
    assert len(ours) == 7, "opened, focused, three choices, saved, deleted"
    assert not any(each.queue for each in ours)
    assert all(each.api_name is False or each.api_visibility == "private" for each in ours)


def test_closing_the_menu_of_tasks_keeps_the_sub_task(tab: EditxTab) -> None:
    for task, sub_task, kept in [("emotion", "sad", "sad"), ("speed", "sad", "faster"), ("vad", "sad", None)]:
        assert tab.tasks.choose(task, sub_task)[0]["value"] == kept
