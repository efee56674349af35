from __future__ import annotations

from html import escape

import pytest

from gpu_manager import SimulatedDevice
from residency.diagnosis import in_words
from residency.errors import DeviceOutOfMemory, InvalidInput, NotAllowed, OverBudget, UnknownModel
from residency.web.language import Say, both, bracketed, en, mark, preferred, reason, translated, zh


@pytest.mark.parametrize(
    ("header", "say"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", zh),
        ("en-US,en;q=0.9,zh;q=0.8", en),
        ("en;q=0.5, zh;q=0.9", zh),
        ("de-DE,de;q=0.9", en),
        ("de,zh;q=0.3", zh),
        ("ZH-tw", zh),
        ("zh;q=much, en", en),
        ("zh; q=0.5, en; q=0.9", en),
        ("en ;q=0.5 , zh ; q = 0.9", zh),
        ("zh;q=0, fr", en),
        ("fr-FR,fr;q=0.9,zh-CN;q=0.8,en;q=0.7", zh),
        ("zha, en", en),
        ("*", en),
        ("", both),
        (None, both),
    ],
)
def test_people_read_the_language_that_their_browser_asks_for(header: str | None, say: Say) -> None:
    assert preferred(header) is say


@pytest.mark.parametrize(
    "error",
    [
        InvalidInput("Give text", "请输入"),
        UnknownModel("llm", ("tts",)),
        NotAllowed(),
        InvalidInput("The engine failed: 3 / 0", "引擎出错：3 / 0"),
        OverBudget(100, 50, 150, SimulatedDevice(1 << 30).name),
        DeviceOutOfMemory(100, 50, SimulatedDevice(1 << 30).name),
        DeviceOutOfMemory(100, None, "card", ((7, 5), (8, None))),
    ],
)
def test_an_error_is_said_in_one_language(error: Exception) -> None:
    english, chinese = translated(str(error), en), translated(str(error), zh)
    assert f"{english} / {chinese}" == str(error)
    assert english.isascii()
    assert not chinese.isascii()
    assert not {"(", ";"} & set(chinese)
    assert translated(str(error), both) == str(error)


@pytest.mark.parametrize(
    "sentence", ["no / second / bar / counts", "in one language only", "shape / mismatch", "一 / 二 / 三"]
)
def test_what_cannot_be_told_apart_is_said_whole(sentence: str) -> None:
    assert translated(sentence, en) == translated(sentence, zh) == sentence


def test_an_error_that_was_kept_is_said_in_one_language_without_its_kind() -> None:
    kept = in_words(InvalidInput("No room: let others leave", "没有空间：请释放其他模型"))
    assert reason(kept, en) == "No room: let others leave"
    assert reason(kept, zh) == "没有空间：请释放其他模型"
    assert reason(kept, both) == kept
    for strange in ("OSError: no weights", "Wordless", "OSError: a / b"):
        assert reason(strange, en) == reason(strange, zh) == strange


def test_signs_are_those_of_the_language_also_where_what_is_said_is_escaped() -> None:
    def escaped(chinese: str, english: str) -> str:
        return escape(zh(chinese, english))

    assert [mark(":", say) for say in (zh, en, both, escaped)] == ["：", ": ", ": ", "："]
    assert [bracketed("1", say) for say in (zh, en, both, escaped)] == ["（1）", " (1)", " (1)", "（1）"]
