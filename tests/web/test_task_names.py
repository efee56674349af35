from __future__ import annotations

import re

import pytest

from residency.engines.builtin import supported_edit_types
from residency.web.shared.language import both, en, zh
from residency.web.speech.task_names import STEP_AUDIO_EDIT_TYPES, choices, line, sub_task_name, task_name

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
