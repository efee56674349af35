"""Chinese and English: pages speak the browser's language; programs and logs get both."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str, str], str]
"""Chooses from a sentence in Chinese and the same in English."""


def zh(chinese: str, english: str) -> str:
    return chinese


def en(chinese: str, english: str) -> str:
    return english


def both(chinese: str, english: str) -> str:
    return f"{chinese} / {english}"


def preferred(accept_language: str | None) -> Say:
    """By the header ``Accept-Language``: English for those who read neither, both where nothing is said."""
    if not accept_language:
        return both
    ranked = []
    for place, part in enumerate(accept_language.split(",")):
        tag, _, quality = part.strip().partition(";q=")
        try:
            ranked.append((-float(quality or 1), place, tag.lower()))
        except ValueError:
            continue
    for _, _, tag in sorted(ranked):
        if tag.startswith("zh"):
            return zh
        if tag.startswith("en"):
            return en
    return en


def translated(sentence: str, say: Say) -> str:
    """The half that is wanted of what an error says in both languages: ``English. / 中文。``."""
    english, bar, chinese = sentence.partition(" / ")
    return sentence if not bar or " / " in chinese else say(chinese, english) if say is not both else sentence
