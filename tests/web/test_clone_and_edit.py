"""CLONE + EDIT: two steps of the history under one lease."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from app import EditxTab
from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.cancellation import checkpoint
from residency.errors import InvalidInput
from tts_gpu_managed import GPUManagedTTS

WANTED = {"prompt": "said", "target": "to say", "task": "emotion", "sub_task": "happy"}


class Page:
    """What one visitor presses, with the state that Gradio would keep for them."""

    def __init__(self, tab: EditxTab, recording: str) -> None:
        self.tab, self.recording, self.state = tab, recording, tab.init_state()

    def press(self, **wanted: str | None) -> Any:
        """Presses the button; returns the chat."""
        given = {**WANTED, **wanted}
        chat, self.state, self.message = self.tab.generate_clone_and_edit(
            given["prompt"], self.recording, given["target"], given["task"], given["sub_task"], self.state
        )
        return chat

    @property
    def steps(self) -> list[tuple[Any, ...]]:
        return [(step.edit_type, step.edit_info, step.target_text) for step in self.state["history_messages"]]


CLONE, EDIT = ("clone", None, "to say"), ("emotion", "happy", "to say")


@pytest.fixture
def page(tab: EditxTab, recording: str) -> Page:
    return Page(tab, recording)


def test_both_results_are_in_the_history_and_edit_continues_there(page: Page, engine: Any, folder: Path) -> None:
    assert len(page.press()) == 8
    assert page.message == ""
    assert page.steps == [CLONE, EDIT]
    (clone, _), (edited, _) = page.state["history_audio"]
    assert engine.asked == [
        ("clone", page.recording, "said", "to say"), ("edit", clone, "to say", "emotion", "happy", "to say")
    ]  # fmt: skip
    assert page.state["history_messages"][1].source_audio == clone
    assert sorted(map(str, folder.iterdir())) == sorted([clone, edited])
    page.tab.generate_edit("said", page.recording, "", "vad", None, page.state)
    assert engine.asked[-1][1] == edited


@pytest.mark.parametrize("appends", [True, False])
def test_it_begins_a_new_history_where_clone_does(engine: Any, folder: Path, recording: str, appends: bool) -> None:
    tab = EditxTab(Namespace(tmp_dir=str(folder)), tts_engine=engine, clone_appends=appends)
    page = Page(tab, recording)
    page.press()
    page.press()
    assert page.steps == [CLONE, EDIT] * (2 if appends else 1)
    assert len(list(folder.iterdir())) == len(page.steps)

    async def chats() -> list[Any]:
        inputs = ("said", recording, "to say", "emotion", "happy", page.state)
        return [shown[0] async for shown in tab._on_clone(*inputs, then_edit=True)]

    assert [len(chat) for chat in asyncio.run(chats()) if isinstance(chat, list)] == ([24] if appends else [0, 8])


@pytest.mark.parametrize(
    ("wanted", "field"),
    [({"prompt": ""}, "prompt_text"), ({"target": " "}, "target_text"), ({"task": "clone"}, "task"),
     ({"sub_task": None}, "sub_task"), ({"sub_task": "odd"}, "sub_task")],
)  # fmt: skip
def test_all_inputs_are_checked_before_the_engine_is_asked(
    page: Page, engine: Any, wanted: dict[str, Any], field: str
) -> None:
    page.press(**wanted)
    assert page.message.field == field
    assert not engine.asked
    assert page.steps == []


class TestOnlyTheEditFails:
    @pytest.fixture
    def failing(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Has the edit raise an error, or do something first."""

        def failing(error: Exception | None, act: Any = lambda: None) -> None:
            speak = engine._speak

            def fail(*asked: Any) -> Any:
                if asked[0] == "edit":
                    act()
                    checkpoint()
                    if error:
                        raise error
                return speak(*asked)

            monkeypatch.setattr(engine, "_speak", fail)

        return failing

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (InvalidInput("no such <emotion>", "没有该情绪"), "no such &lt;emotion&gt;"),
            (RuntimeError("broken"), "broken"),
        ],
    )
    def test_the_clone_stays_and_the_message_says_so(
        self, page: Page, failing: Any, folder: Path, error: Exception, said: str
    ) -> None:
        failing(error)
        assert len(page.press()) == 4
        assert page.steps == [CLONE]
        assert [str(path) for path in folder.iterdir()] == [page.state["history_audio"][0][0]]
        assert "The clone succeeded and is kept; its edit did not" in page.message
        assert "克隆已完成并保留" in page.message
        assert said in page.message
        assert "unchanged" not in page.message
        assert "alert" in page.message
        assert page.message.field is None

    def test_a_stop_between_the_steps_keeps_the_clone(self, page: Page, failing: Any, folder: Path) -> None:
        failing(None, lambda: page.tab.page_requests.stop(page.state))
        page.press()
        assert page.steps == [CLONE]
        assert len(list(folder.iterdir())) == 1
        assert "was stopped" in page.message
        assert "alert" not in page.message, "as was wished"

    def test_a_history_that_was_cleared_meanwhile_stays_so(self, page: Page, failing: Any, folder: Path) -> None:
        failing(RuntimeError("broken"), lambda: page.tab._histories.clear(page.state))
        page.press()
        assert page.steps == []
        assert "cleared or replaced" in page.message
        assert not list(folder.iterdir())


def test_a_stop_during_the_clone_makes_nothing(page: Page, engine: Any, folder: Path, monkeypatch: Any) -> None:
    speak = engine._speak
    stop = page.tab.page_requests.stop
    monkeypatch.setattr(engine, "_speak", lambda *asked: (stop(page.state), speak(*asked))[1])
    page.press()
    assert [asked[0] for asked in engine.asked] == ["clone"]
    assert page.steps == []
    assert not list(folder.glob("*"))
    assert "was stopped" in page.message


class Steps:
    """An engine that calls ``between`` in each step."""

    between: Any = staticmethod(lambda: None)

    def clone(self, *arguments: Any) -> tuple[Any, int]:
        self.between()
        return np.full((1, 2400), 0.25, np.float32), 24000

    def edit(self, *arguments: Any) -> tuple[Any, int]:
        self.between()
        return np.full((1, 1200), 0.25, np.float32), 24000


@pytest.mark.in_process("the engine of the tests notes its calls here")
class TestWithAManager:
    @pytest.fixture
    def manager(self) -> Iterator[GPUResourceManager]:
        with GPUResourceManager(SimulatedDevice(1 << 30)) as manager:
            yield manager

    @pytest.fixture
    def engine(self) -> Steps:
        return Steps()

    @pytest.fixture
    def tab(self, manager: GPUResourceManager, engine: Steps, folder: Path) -> EditxTab:
        tts = GPUManagedTTS(None, manager=manager, load=lambda: engine, check_text=lambda text: None)
        return EditxTab(Namespace(tmp_dir=str(folder)), tts_engine=tts)

    def test_it_is_one_request_and_the_model_leaves_once(
        self, page: Page, manager: GPUResourceManager, engine: Steps
    ) -> None:
        held = list[int]()
        engine.between = lambda: held.append(manager.status()["models"]["tts"]["leases"])
        page.press()
        assert page.message == ""
        assert page.steps == [CLONE, EDIT]
        assert [soundfile.info(path).frames for path, _ in page.state["history_audio"]] == [2400, 1200]
        totals = manager.history()["models"]["tts"]["totals"]
        assert held == [1, 1]
        assert totals["requests"] == {"ok": 1}, "one grant for both steps"
        moves = [(move["from"], move["to"]) for move in manager.history()["models"]["tts"]["moves"]]
        assert sorted(moves) == [("gpu", "cpu"), ("released", "gpu")]

    def test_what_the_engine_cannot_say_loads_nothing(
        self, manager: GPUResourceManager, engine: Steps, folder: Path, recording: str
    ) -> None:
        def check_text(text: str) -> None:
            raise InvalidInput("not in English", "不是英语")

        tts = GPUManagedTTS(None, manager=manager, load=lambda: engine, check_text=check_text)
        page = Page(EditxTab(Namespace(tmp_dir=str(folder)), tts_engine=tts), recording)
        page.press()
        assert page.message.field == "target_text"
        assert manager.status()["models"]["tts"]["state"] == "released"
