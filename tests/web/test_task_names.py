from __future__ import annotations

import re

import pytest

from residency.engines.builtin import supported_edit_types
from residency.web.shared.language import both, en, zh
from residency.web.speech.task_names import STEP_AUDIO_EDIT_TYPES, choices, line, named_in, sub_task_name, task_name

PAIRS = [(task, sub_task) for task, values in STEP_AUDIO_EDIT_TYPES.items() for sub_task in [None, *values]]


@pytest.mark.parametrize(("task", "sub_task"), PAIRS)
def test_each_has_a_name_and_a_line_in_both_languages(task: str, sub_task: str | None) -> None:
    names = [
        task_name(task, localize) if sub_task is None else sub_task_name(task, sub_task, localize)
        for localize in (zh, en)
    ]
    for text, chinese in zip(
        (*names, line(task, sub_task, zh), line(task, sub_task, en)), (True, False) * 2, strict=True
    ):
        assert text
        assert (re.search("[\u4e00-\u9fff]", text) is not None) == chinese, text
    assert (sub_task or task) in names[0], "who knows the engine finds its word"


def test_what_the_engine_is_given_stays_what_it_was() -> None:
    for types in (STEP_AUDIO_EDIT_TYPES, supported_edit_types()):
        for localize in (zh, en, both):
            assert [value for _, value in choices([*types], None, localize)] == [*types]
            for task, values in types.items():
                named = choices(values, task, localize)
                assert [value for _, value in named] == values
                assert len({name for name, _ in named}) == len(values)


def test_what_is_not_known_is_called_by_its_value() -> None:
    assert task_name("singing", zh) == "singing"
    assert sub_task_name("singing", "loud", en) == "loud"
    assert line("singing", "loud", zh) == ""
    assert line(None, None, en) == ""
    assert task_name("vad", both) == "去除停顿（vad） / cut pauses (vad)"


INSTRUCTED = {task: STEP_AUDIO_EDIT_TYPES[task] for task in ("emotion", "style", "speed")}


@pytest.mark.parametrize(
    "denied",
    ["Don't be happy", "don’t be happy", "dont be happy", "not angry", "Never sound angry.", "without whisper",
     "no whisper", "stop shout", "without whispering", "stop shouting", "Avoid a warm voice.",
     "anything but happy", "less happy", "a neutral voice instead of a happy one",
     "Don't be angry, sad, or shy.", "Happy is not what I want.",
     "It shouldn't be too happy", "I can't stand this happy voice", "non-happy", "neither happy nor excited",
     "Avoid: happy", "Avoid:\n- happy\n- sad", "Avoid:\n\n - happy\n \n\t- sad", "避免：高兴",
     "不要高兴", "不要开心", "别生气", "请不要生气。",
     "没有生气", "勿用耳语", "避免夸张", "不要悲伤、生气", "高兴不起来"],
)  # fmt: skip
def test_a_denied_name_is_none(denied: str) -> None:
    assert named_in(denied, INSTRUCTED) is None


@pytest.mark.parametrize(
    ("instructions", "task", "sub_task"),
    [("Tone:\n- happy\n- not sad\nSpeak clearly.", "emotion", "happy"),
     ("Be happy, not angry.", "emotion", "happy"), ("not angry, but happy", "emotion", "happy"),
     ("Don't be sad. Be happy!", "emotion", "happy"), ("whisper without anger", "style", "whisper"),
     ("happy instead of sad", "emotion", "happy"), ("非常高兴", "emotion", "happy"), ("特别高兴", "emotion", "happy"),
     ("无比高兴", "emotion", "happy"), ("不要生气，但要严肃", "style", "serious"),
     ("不是悲伤，而是高兴", "emotion", "happy"), ("别着急。温柔", "style", "gentle"), ("act_coy", "style", "act_coy"),
     ("Speak like a CHILD!", "style", "child"),
     ("notable: happy", "emotion", "happy"), ("Speak much faster now.", "speed", "more faster")],
)  # fmt: skip
def test_a_name_beside_a_denial_counts(instructions: str, task: str, sub_task: str) -> None:
    assert named_in(instructions, INSTRUCTED) == (task, sub_task)


def test_blank_lines_take_linear_time() -> None:
    """In each line the pattern looks at one character after it, not at all lines that follow."""
    assert named_in("happy" + "\n" * 500_000, INSTRUCTED) == ("emotion", "happy")


@pytest.mark.parametrize(
    "other",
    ["unhappy", "happyness", "happily", "storyteller", "warmth", "newspaper", "生气勃勃", "happy and sad",
     "happy\nsad"],
)  # fmt: skip
def test_a_part_of_another_word_and_several_names_are_none(other: str) -> None:
    assert named_in(other, INSTRUCTED) is None
