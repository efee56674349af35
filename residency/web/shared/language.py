"""Chinese and English texts: the browser's language for pages, both languages for programs and logs."""

from __future__ import annotations

import re
from collections.abc import Callable

from ...errors import ResidencyError
from ...observability.error_classification import message_of
from ...sentences import Sentence

Localize = Callable[[str, str], str]
"""Takes a sentence in Chinese and in English; returns one, or both."""


def zh(chinese: str, english: str) -> str:
    return chinese


def en(chinese: str, english: str) -> str:
    return english


def both(chinese: str, english: str) -> str:
    return f"{chinese} / {english}"


def mark(sign: str, localize: Localize) -> str:
    """Returns a colon or comma with the spacing of the language."""
    return {":": "：", ",": "，"}[sign] if _is_chinese(localize) else f"{sign} "


def bracketed(text: str, localize: Localize) -> str:
    """Returns the text in brackets, with the spacing of the language."""
    return f"（{text}）" if _is_chinese(localize) else f" ({text})"


def _is_chinese(localize: Localize) -> bool:
    """Whether ``localize`` returns Chinese; works for wrappers of `zh` too."""
    return localize("zh", "en") == "zh"


def preferred(accept_language: str | None) -> Localize:
    """Returns the `Localize` for a header ``Accept-Language``: English if it has neither language, both if empty."""
    if not accept_language:
        return both
    ranked = []
    for place, part in enumerate(accept_language.lower().split(",")):
        tag, *weights = re.split(r"\s*;\s*q\s*=\s*", part.strip())
        try:
            quality = float(weights[0]) if weights else 1.0
        except ValueError:
            continue
        if quality > 0:
            ranked.append((-quality, place, tag.partition("-")[0]))
    return next(({"zh": zh, "en": en}[tag] for _, _, tag in sorted(ranked) if tag in ("zh", "en")), en)


def translated(said: str | ResidencyError, localize: Localize) -> str:
    """Returns the message of an error, or a `Sentence`, in one language; other strings unchanged."""
    sentence = message_of(said) if isinstance(said, ResidencyError) else Sentence.of(said)
    return str(sentence) if localize is both else localize(sentence.zh, sentence.en)


def of_device(pair: tuple[str, str], device_kind: str, localize: Localize) -> str:
    """Returns a phrase in one language; for a simulated card, adds "simulated" to each mention of the GPU."""
    chinese, english = pair
    if device_kind == "simulated":
        chinese = re.sub(" ?GPU", "模拟 GPU", chinese.replace("显存", "模拟显存"))
        english = english.replace("GPU", "simulated GPU")
        english = english[:1].upper() + english[1:] if pair[1].startswith("GPU ") else english
    return localize(chinese, english)
