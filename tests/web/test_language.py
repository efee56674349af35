from __future__ import annotations

from html import escape

import pytest

from gpu_manager import SimulatedDevice
from residency.errors import (
    DeviceOutOfMemory,
    InvalidInput,
    NotAllowed,
    OverBudget,
    ResidencyError,
    SnapshotUnusable,
    UnknownModel,
)
from residency.observability.error_classification import in_words, message_of
from residency.sentences import Sentence
from residency.web.shared.language import Localize, both, bracketed, en, mark, preferred, translated, zh
from residency.web.speech.service import explain
from residency.web.ui.status_text import device_name


@pytest.mark.parametrize(
    ("header", "localize"),
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
def test_people_read_the_language_that_their_browser_asks_for(header: str | None, localize: Localize) -> None:
    assert preferred(header) is localize


@pytest.mark.parametrize(
    "error",
    [
        InvalidInput("Give text", "请输入"),
        UnknownModel("llm", ("tts",)),
        NotAllowed(),
        InvalidInput("no file a / b / c, though 模型 / d is there", "没有文件 a / b / c\n / 但有 模型 / d"),
        OverBudget(100, 50, 150, SimulatedDevice(1 << 30).name),
        DeviceOutOfMemory(100, 50, SimulatedDevice(1 << 30).name),
        DeviceOutOfMemory(100, None, "card / of two names", ((7, 5), (8, None))),
        SnapshotUnusable("tts", Sentence("it is / gone", "已丢失")),
    ],
)
def test_an_error_is_said_in_one_language(error: ResidencyError) -> None:
    assert translated(error, en) == translated(in_words(error), en) == error.en
    assert translated(error, zh) == translated(in_words(error), zh) == error.zh
    assert translated(error, both) == str(error) == f"{error.en} / {error.zh}"
    assert translated(in_words(error), both) == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("words", ["no / second / bar / counts", "shape / mismatch", "一 / 二 / 三", "a: b / 二"])
def test_what_others_say_is_said_whole(words: str) -> None:
    for said in (words, in_words(OSError(words)), explain(OSError(words)), message_of(OSError(words))):
        assert all(words in translated(said, localize) for localize in (en, zh, both))


def test_devices_have_a_name_in_each_language() -> None:
    device = {"name": SimulatedDevice(48 << 30).name}
    assert device_name(device, en) == "Simulated GPU (48 GB)"
    assert device_name(device, zh) == "模拟 GPU（48 GB）"
    assert device["name"] == "Simulated GPU (48 GB) / 模拟 GPU"
    card = {"name": "NVIDIA / H100 (80 GB)"}
    assert {device_name(card, localize) for localize in (en, zh, both)} == {"NVIDIA / H100 (80 GB)"}


def test_signs_are_those_of_the_language_also_where_what_is_said_is_escaped() -> None:
    def escaped(chinese: str, english: str) -> str:
        return escape(zh(chinese, english))

    assert [mark(":", localize) for localize in (zh, en, both, escaped)] == ["：", ": ", ": ", "："]
    assert [bracketed("1", localize) for localize in (zh, en, both, escaped)] == ["（1）", " (1)", " (1)", "（1）"]
