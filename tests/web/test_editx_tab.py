from __future__ import annotations

import asyncio
import html
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import soundfile

from app import EditxTab
from gpu_manager import GPUResourceManager
from residency.cancellation import checkpoint
from residency.engines.text import speakable
from residency.errors import InvalidInput, ManagerClosed, ModelBusy, RequestCancelled, RequestTimeout
from residency.web.shared.language import Localize, en, zh
from residency.web.speech.task_names import STEP_AUDIO_EDIT_TYPES, choices
from residency.web.ui import guidance


class Session:
    """What one visitor does on the page, with the state that Gradio would keep for them."""

    def __init__(self, tab: EditxTab, recording: str) -> None:
        self.tab, self.recording = tab, recording
        self.state = tab.init_state()
        self.chat: Any = []
        self.message = ""

    def clone(self, prompt: str = "said", target: str = "to say", task: str = "clone") -> Session:
        return self._take(self.tab.generate_clone(prompt, self.recording, target, task, None, self.state))

    def edit(self, task: str = "speed", info: str | None = "faster", target: str = "") -> Session:
        return self._take(self.tab.generate_edit("said", self.recording, target, task, info, self.state))

    def _take(self, answer: tuple[Any, Any, str]) -> Session:
        chat, self.state, self.message = answer
        if isinstance(chat, list):
            self.chat = chat
        return self

    @property
    def results(self) -> list[tuple[str, str]]:
        return self.state["history_audio"]


@pytest.fixture
def session(tab: EditxTab, recording: str) -> Session:
    return Session(tab, recording)


def test_clone_answers_text_and_players_of_input_and_output(session: Session, engine: Any) -> None:
    session.clone("said", "to say")
    assert engine.asked == [("clone", session.recording, "said", "to say")]
    assert [message["role"] for message in session.chat] == ["user", "user", "assistant", "assistant"]
    assert "said" in session.chat[0]["content"]
    assert "to say" in session.chat[2]["content"]
    assert all(isinstance(session.chat[place]["content"], gr.Audio) for place in (1, 3))
    audio, sample_rate = soundfile.read(session.results[0][0])
    assert (len(audio), sample_rate) == (2400, 24000)
    assert session.message == ""


@pytest.mark.parametrize("ask", ["clone", "edit"])
def test_a_request_checks_its_recording_once(session: Session, monkeypatch: pytest.MonkeyPatch, ask: str) -> None:
    incoming, checked = session.tab.speech.incoming, list[str | None]()
    readable = incoming.readable
    monkeypatch.setattr(incoming, "readable", lambda path: (checked.append(path), readable(path))[1])
    getattr(session, ask)()
    assert session.message == ""
    assert checked == [session.recording]


def test_edits_stack_on_the_latest_result_and_leave_no_other_files(session: Session, engine: Any, folder: Path) -> None:
    session.clone(target="to say").edit("speed", "slower").edit("denoise", None)
    files = [path for path, _ in session.results]
    assert engine.asked[1:] == [
        ("edit", files[0], "to say", "speed", "slower", "to say"),
        ("edit", files[1], "to say", "denoise", None, "to say"),
    ]
    assert len(session.chat) == 12
    assert sorted(map(str, folder.iterdir())) == sorted(files)


def test_the_first_edit_works_on_the_recording(session: Session, engine: Any) -> None:
    session.edit("vad", None)
    assert engine.asked == [("edit", session.recording, "said", "vad", None, "said")]


def test_only_paralinguistic_uses_the_target_text(session: Session, engine: Any) -> None:
    session.clone().edit("paralinguistic", None, "to[Laughter] say").edit("vad", None, "something else")
    assert [asked[-1] for asked in engine.asked[1:]] == ["to[Laughter] say", "to[Laughter] say"]


def test_a_clone_that_succeeds_begins_a_new_history(session: Session, folder: Path) -> None:
    session.clone().edit().clone()
    assert len(session.chat) == 4
    assert list(folder.iterdir()) == [Path(session.results[0][0])]


def test_a_clone_continues_the_history_where_the_public_app_does(engine: Any, folder: Path, recording: str) -> None:
    tab = EditxTab(Namespace(tmp_dir=str(folder)), tts_engine=engine, clone_appends=True)
    session = Session(tab, recording).clone(target="one").edit().clone(target="two").edit("denoise", None)
    assert len(session.chat) == 16
    assert [text for _, text in session.results] == ["one", "one", "two", "two"]
    assert all(Path(path).is_file() for path, _ in session.results)
    assert engine.asked[-1][1:3] == (session.results[2][0], "two"), "EDIT works on the latest result"


@pytest.mark.parametrize("appends", [True, False])
def test_the_chat_is_emptied_first_only_for_a_new_history(
    engine: Any, folder: Path, recording: str, appends: bool
) -> None:
    tab = EditxTab(Namespace(tmp_dir=str(folder)), tts_engine=engine, clone_appends=appends)

    async def chats() -> list[Any]:
        return [shown[0] async for shown in tab._on_clone("said", recording, "to say", "clone", None, tab.init_state())]

    lists = [chat for chat in asyncio.run(chats()) if isinstance(chat, list)]
    assert [len(chat) for chat in lists] == ([4] if appends else [0, 4])


@pytest.mark.parametrize(
    ("arguments", "said", "unsaid"),
    [
        ({}, ["a new history begins", "[Laughter]"], ["appended", "[laugh]"]),
        (
            {"clone_appends": True, "more_tags": ("laugh", "clears throat")},
            ["appended to the history", "[Laughter]", "[laugh] [clears throat]"],
            ["a new history begins"],
        ),
    ],
)
def test_the_help_follows_the_engine(engine: Any, folder: Path, arguments: Any, said: Any, unsaid: Any) -> None:
    tab = EditxTab(Namespace(tmp_dir=str(folder)), tts_engine=engine, **arguments)
    with gr.Blocks() as blocks:
        tab.register_components()
    text = str([component["props"].get("value") for component in blocks.get_config_file()["components"]])
    assert all(each in text for each in said)
    assert not any(each in text for each in unsaid)
    assert ("追加到历史" in guidance.buttons_help("clone_appends" in arguments)[0]) == ("clone_appends" in arguments)


@pytest.mark.parametrize("ask", ["clone", "edit"])
def test_a_recording_that_the_engine_cannot_take_is_refused_beside_it(
    session: Session, engine: Any, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    def check(path: str) -> None:
        assert path == session.recording
        raise InvalidInput("the recording is too long", "录音过长")

    monkeypatch.setattr(engine, "check_audio", check, raising=False)
    getattr(session, ask)()
    assert "too long" in session.message
    assert session.message.field == "recording"
    assert not engine.asked


@pytest.mark.parametrize("mishap", ["empty prompt", "empty target", "no audio", "engine"])
def test_a_clone_that_fails_loses_nothing(session: Session, engine: Any, mishap: str) -> None:
    session.clone().edit()
    chat, state = session.chat, session.state
    if mishap == "empty prompt":
        session.clone(prompt=" ")
    elif mishap == "empty target":
        session.clone(target="")
    elif mishap == "no audio":
        session.recording = ""
        session.clone()
    else:
        engine.error = InvalidInput("no speech <here>", "没有语音")
        session.clone()
        assert "no speech &lt;here&gt; / 没有语音" in session.message
    assert "alert" in session.message
    assert (session.chat, session.state) == (chat, state)
    assert all(Path(path).is_file() for path, _ in session.results)


@pytest.mark.parametrize(
    ("task", "info"),
    [("clone", None), ("", None), ("speed", None), ("speed", "twice"), ("paralinguistic", None)],
)
def test_an_edit_that_cannot_be_says_so_before_the_engine_is_asked(
    session: Session, engine: Any, task: str, info: str | None
) -> None:
    session.clone().edit(task, info)
    assert "alert" in session.message
    assert len(session.results) == len(engine.asked) == 1
    assert session.edit().message == ""


@pytest.mark.parametrize(
    ("localize", "task", "info", "expected"),
    [
        (
            en,
            "clone",
            None,
            ["needs a task", "clone is not an edit", "style, cut pauses (vad), reduce noise (denoise)"],
        ),
        (zh, "clone", None, ["需要编辑任务", "“克隆音色”不是编辑", "风格（style）、去除停顿（vad）、降噪（denoise）"]),
        (en, "speed", None, ["The task speed needs a sub-task", "slower, much faster (more faster)"]),
        (zh, "speed", None, ["任务 语速（speed） 需要子任务", "慢一些（slower）、快很多（more faster）"]),
        (zh, "speed", "twice", ["没有子任务 'twice'"]),
        (en, "style", None, ["elderly person (older)"]),
    ],
)
def test_an_error_about_a_task_calls_tasks_as_the_menus_do(
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
    localize: Localize,
    task: str,
    info: str | None,
    expected: list[str],
) -> None:
    monkeypatch.setattr("residency.web.editx_tab.localizer", lambda: localize)
    message = session.edit(task, info).message
    for words in expected:
        assert html.escape(words) in message
    menu = choices([name for name in session.tab.speech.edit_types if name != "clone"], None, localize)
    assert task != "clone" or all(name in message for name, _ in menu)


def test_what_the_engine_says_in_its_own_words_is_shown(session: Session, engine: Any) -> None:
    engine.error = type("HTTPException", (Exception,), {"detail": "Unsupported edit type", "status_code": 400})()
    assert "cannot do this: Unsupported edit type" in session.edit("singing", None).message
    engine.error = RuntimeError("CUDA error")
    assert "CUDA error" in session.clone().message


def test_a_text_that_the_engine_cannot_say_is_refused_before_it_is_asked(session: Session, engine: Any) -> None:
    engine.check_text = speakable
    message = session.clone(target="你好，世界").message
    assert "请用英文填写：内置引擎只会说英语" in message
    assert message.index("Write the text in English") < message.index("--model-path")
    assert not engine.asked
    assert session.clone(target="Hello").message == ""


@pytest.mark.parametrize(
    ("error", "en", "zh"),
    [
        (RequestTimeout("tts", 30.0, 2, "restoring"), "place 2 in the queue", "排队第 2 位"),
        (ModelBusy("tts", 3, "device"), "is busy", "正忙"),
        (RequestCancelled("tts"), "was cancelled", "被取消"),
        (ManagerClosed(), "shutting down", "正在关闭"),
    ],
)
def test_why_there_was_no_model_is_said_in_both_languages(
    session: Session, engine: Any, error: Exception, en: str, zh: str
) -> None:
    engine.error = error
    message = session.clone().message
    assert en in message
    assert zh in message


@pytest.mark.parametrize("task", ["clone", "speed", "", None])
def test_clone_clones_whatever_the_task_is(session: Session, engine: Any, task: Any) -> None:
    session.clone(task=task)
    assert session.message == ""
    assert [asked[0] for asked in engine.asked] == ["clone"]
    assert "clone" in session.chat[0]["content"]


def test_a_message_names_the_field_that_it_is_about(session: Session) -> None:
    fields = {
        "prompt_text": lambda: session.clone(prompt=" "),
        "target_text": lambda: session.clone(target=" "),
        "task": lambda: session.edit("clone", None),
        "sub_task": lambda: session.edit("speed", "twice"),
    }
    for field, act in fields.items():
        assert act().message.field == field
    session.recording = ""
    assert session.clone().message.field == "recording"
    assert session.edit("paralinguistic", None).message.field == "recording"


class TestStopping:
    """What is under way is stopped, by Stop or because the history is cleared."""

    @pytest.mark.parametrize("ask", ["clone", "edit"])
    def test_a_result_that_comes_all_the_same_is_dropped(
        self, session: Session, engine: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, ask: str
    ) -> None:
        session.clone()
        before, chat = list(session.results), session.chat
        speak = engine._speak
        monkeypatch.setattr(
            engine, "_speak", lambda *asked: (session.tab.page_requests.stop(session.state), speak(*asked))[1]
        )
        getattr(session, ask)()
        assert "was stopped" in session.message
        assert "alert" not in session.message, "as was wished"
        assert (session.results, session.chat) == (before, chat)
        assert [str(path) for path in folder.iterdir()] == [before[0][0]]
        monkeypatch.undo()
        assert session.edit().message == ""

    def test_clearing_the_history_stops_what_would_be_dropped(
        self, session: Session, engine: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        speak, ended = engine._speak, list[bool]()

        def step_by_step(*asked: Any) -> Any:
            session.tab.clear_history(session.state)
            checkpoint()
            ended.append(True)
            return speak(*asked)

        monkeypatch.setattr(engine, "_speak", step_by_step)
        assert "cleared or replaced" in session.clone().message
        assert not ended, "the engine went on"

    def test_only_the_requests_of_its_session_are_stopped(
        self, tab: EditxTab, engine: Any, recording: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine, theirs = Session(tab, recording), Session(tab, recording)
        speak = engine._speak
        monkeypatch.setattr(engine, "_speak", lambda *asked: (tab.page_requests.stop(theirs.state), speak(*asked))[1])
        assert mine.clone().message == ""


def test_clear_forgets_history_and_files(session: Session, folder: Path) -> None:
    session.clone().edit()
    chat, state, message = session.tab.clear_history(session.state)
    assert (chat, state, message) == ([], session.tab.init_state(), "")
    assert not list(folder.iterdir())


class TestOvertaken:
    """A request is overtaken by another that clears the history, or begins a new one."""

    @pytest.fixture
    def meanwhile(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Has something happen while the engine speaks once, which then raises an error, if there is one."""

        def meanwhile(act: Any, error: Exception | None = None) -> None:
            speak = engine._speak

            def and_then(*asked: Any) -> Any:
                monkeypatch.setattr(engine, "_speak", speak)
                act()
                if error:
                    raise error
                return speak(*asked)

            monkeypatch.setattr(engine, "_speak", and_then)

        return meanwhile

    @pytest.mark.parametrize("late", ["clone", "edit"])
    @pytest.mark.parametrize("error", [None, InvalidInput("The recording is gone", "录音已不存在")])
    def test_what_was_cleared_stays_cleared(
        self, session: Session, folder: Path, meanwhile: Any, late: str, error: Exception | None
    ) -> None:
        session.clone()
        meanwhile(lambda: session.tab.clear_history(session.state), error)
        getattr(session, late)()
        assert "cleared or replaced" in session.message
        assert session.state == {**session.tab.init_state(), "message": session.message}
        assert not list(folder.iterdir())
        assert session.edit().message == ""
        assert len(session.results) == 1

    def test_a_new_clone_is_not_lost_to_an_edit_of_the_old(
        self, session: Session, folder: Path, meanwhile: Any
    ) -> None:
        session.clone(target="old")
        meanwhile(lambda: session.clone(target="new"))
        session.edit()
        assert "cleared or replaced" in session.message
        assert [says for _, says in session.results] == ["new"]
        assert list(folder.iterdir()) == [Path(session.results[0][0])]

    def test_two_edits_both_stay(self, session: Session, folder: Path, meanwhile: Any) -> None:
        session.clone()
        meanwhile(lambda: session.edit("vad", None))
        assert session.edit().message == ""
        assert len(session.chat) == 12
        assert len(list(folder.iterdir())) == 3

    def test_an_edit_whose_latest_result_is_gone_says_what_to_do(self, session: Session) -> None:
        session.clone()
        Path(session.results[0][0]).unlink()
        assert "press Clear History" in session.edit().message
        assert str(Path(session.results[0][0]).parent) not in session.message


@pytest.mark.parametrize("text", ["<b>bold</b>", "<img src=x>", "R&D &lt; &copy 1 < 2 [Laughter]", "</think> <!-- -->"])
def test_texts_are_shown_as_they_are(session: Session, text: str) -> None:
    session.clone(prompt=text, target=text)
    for place in (0, 2):
        shown = session.chat[place]["content"]
        assert html.unescape(shown).endswith(text)
        assert not re.search("<[a-zA-Z/!?]", shown)
    assert "R&D" not in text or "R&D" in shown, "what is no markup can be copied"


def test_a_target_text_may_have_a_limit_of_its_own(engine: Any, folder: Path, recording: str) -> None:
    session = Session(EditxTab(Namespace(tmp_dir=str(folder)), tts_engine=engine, max_target_text=9), recording)
    session.clone(target="0123456789")
    assert "10 characters, more than 9" in session.message
    assert session.message.field == "target_text"
    assert not session.clone(prompt="0123456789", target="123456789").message


@pytest.mark.parametrize(("channels", "refused"), [(1, None), (2, None), (3, "convert it to mono at 48 kHz")])
def test_a_recording_of_many_channels_is_refused_however_short(
    engine: Any, folder: Path, tmp_path: Path, channels: int, refused: str | None
) -> None:
    soundfile.write(tmp_path / "many.flac", np.zeros((96000, channels), np.int16), 48000)
    speech = EditxTab(Namespace(tmp_dir=str(folder), max_audio=2.0, max_text=100), tts_engine=engine).speech
    if refused:
        with pytest.raises(InvalidInput, match=refused):
            speech.incoming.readable(str(tmp_path / "many.flac"))
    else:
        assert speech.clone(speech.incoming.readable(str(tmp_path / "many.flac")), "said", "to say")


def test_sessions_do_not_see_each_other(tab: EditxTab, recording: str) -> None:
    mine, theirs = Session(tab, recording).clone(), Session(tab, recording)
    assert theirs.edit().results[0] != mine.results[0]
    assert len(mine.chat) == 4


def test_sub_tasks_follow_the_task(tab: EditxTab) -> None:
    choices = tab.update_edit_info("speed")["choices"]
    assert [value for _, value in choices] == STEP_AUDIO_EDIT_TYPES["speed"]
    assert tab.update_edit_info("vad") | {"choices": [], "value": None} == tab.update_edit_info("vad")


class TestWithoutManagement:
    def test_gpu_methods_say_how_to_enable_it(self, tab: EditxTab) -> None:
        for localize in (tab.get_gpu_status, tab.offload_gpu, tab.release_gpu):
            assert "--enable-gpu-management" in localize()

    def test_the_page_has_no_panel(self, tab: EditxTab) -> None:
        assert "gpu" not in drawn(tab)


class TestWithManagement:
    @pytest.fixture
    def tab(self, engine: Any, folder: Path, manager: GPUResourceManager) -> Iterator[EditxTab]:
        engine.manager, engine.name = manager, "tts"
        with manager.lease("tts"):
            pass
        return EditxTab(Namespace(tmp_dir=str(folder)), tts_engine=engine)

    def test_status_offload_and_release_tell_the_truth(self, tab: EditxTab, manager: GPUResourceManager) -> None:
        assert "In main memory" in tab.get_gpu_status()
        assert "Simulated" in tab.get_gpu_status()
        assert "Offloaded" in tab.offload_gpu()
        assert "tts: 已释放 / Released" in tab.release_gpu()
        assert manager.status()["models"]["tts"]["state"] == "released"

    def test_during_a_request_they_say_that_they_follow(self, tab: EditxTab, manager: GPUResourceManager) -> None:
        with manager.lease("tts"):
            assert "once the running request or load has ended" in tab.release_gpu()
            assert "On the simulated GPU" in tab.get_gpu_status()
        assert "Released" in tab.get_gpu_status()

    def test_a_failure_becomes_the_answer(self, tab: EditxTab, manager: GPUResourceManager) -> None:
        manager.close()
        assert "closed" in tab.offload_gpu()

    def test_looking_never_counts_as_use(self, tab: EditxTab, manager: GPUResourceManager, clock: Any) -> None:
        clock.advance(100)
        tab.get_gpu_status()
        assert manager.status()["models"]["tts"]["idle_s"] == 100

    def test_what_people_do_before_they_ask_shows_intent(self, tab: EditxTab) -> None:
        shown, waits = intent_events(tab)
        assert shown == {
            ("prompt-text", "focus"), ("prompt-text", "input"), ("target-text", "focus"), ("target-text", "input"),
            ("prompt-audio", "start_recording"), ("prompt-audio", "upload"), ("sample-high", "click"),
            ("sample-low", "click"), ("voice", "input"),
        }  # fmt: skip
        assert not waits

    def test_the_page_has_the_panel(self, tab: EditxTab) -> None:
        assert "gpu-status" in drawn(tab)


def intent_events(tab: EditxTab) -> tuple[set[tuple[str, str]], bool]:
    """Which events of the page show intent, and whether any of them waits in the queue or shows that it works."""
    with gr.Blocks() as blocks:
        tab.register_components()
        tab.register_events()
    assert tab.prewarm
    functions = [function for function in blocks.fns.values() if function.fn == tab.prewarm.show]
    # Keys press a hidden button in the browser, so that not each of them is a request.
    typing = [function for function in blocks.fns.values() if "#prewarm" in str(function.js)]
    every = [target for function in functions + typing for target in function.targets]
    targets = {(blocks.blocks[number].elem_id, event) for number, event in every}
    assert ("prewarm", "click") in targets or not targets
    targets.discard(("prewarm", "click"))
    waits = any(function.queue or function.show_progress != "hidden" for function in functions)
    return targets, waits


def drawn(tab: EditxTab) -> str:
    """The configuration of a page with this tab."""
    with gr.Blocks() as blocks:
        tab.register_components()
        tab.register_events()
    return str([component["props"].get("elem_id") for component in blocks.get_config_file()["components"]])


# -- transcription ----------------------------------------------------------------------------------------------


def listening(folder: Path, recognize: Any) -> EditxTab:
    return EditxTab(Namespace(tmp_dir=str(folder)), recognize=recognize)


def test_what_is_said_is_written_only_where_no_text_is(folder: Path, recording: str) -> None:
    tab = listening(folder, lambda path: f" heard {Path(path).name} ")
    texts = [last_heard(tab, recording, prompt)[0]["text"] for prompt in ("", "  ", "mine")]
    assert texts == ["heard prompt.wav", "heard prompt.wav", ""]
    assert last_heard(tab, None) == [gr.skip(), gr.skip()]


def test_a_recognizer_that_fails_becomes_a_message(folder: Path, recording: str) -> None:
    def fail(path: str) -> str:
        raise InvalidInput("no <model>", "没有模型")

    heard, _ = last_heard(listening(folder, fail), recording)
    assert heard["text"] == ""
    assert "no &lt;model&gt; / 没有模型" in heard["message"]


def test_listening_to_a_recording_leaves_the_message_about_it(folder: Path, recording: str) -> None:
    """The recording is received at the same time, and either may end first."""
    tab = listening(folder, lambda path: "heard")
    letter = Path(recording).with_name("letter.txt")
    letter.write_text("no sound")
    assert last_heard(tab, str(letter)) == [{"recordings": [], "text": "", "message": ""}, ""]
    heard = {"recordings": [recording, recording], "text": "heard", "message": ""}
    assert last_heard(tab, recording) == [heard, ""]


def last_heard(tab: EditxTab, recording: str | None, prompt: str = "") -> list[Any]:
    async def last() -> list[Any]:
        return [shown async for shown in tab.transcription.transcribe(recording, prompt)][-1]

    return asyncio.run(last())


def test_without_a_recognizer_nothing_is_transcribed(tab: EditxTab, recording: str) -> None:
    assert tab.speech.transcribes is False
    with pytest.raises(InvalidInput, match="--enable-auto-transcribe"):
        tab.speech.transcribe(recording)


def test_after_the_end_has_begun_nothing_is_transcribed(folder: Path, recording: str) -> None:
    tab = listening(folder, lambda path: "heard")
    tab.speech.close()
    assert "shutting down" in last_heard(tab, recording)[0]["message"]
