"""A sentence in English and Chinese: logs and JSON contain both, pages and terminals show one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Literal


class Sentence(str):
    """The string ``en / zh`` with its halves as attributes.

    ``en`` and ``zh`` are equal for names and for messages of other programs. ``whole`` replaces the string itself.
    """

    en: str
    zh: str

    def __new__(cls, en: str, zh: str, whole: str | None = None) -> Sentence:
        if whole is None:
            whole = en if en == zh else f"{en} / {zh}"
        sentence = super().__new__(cls, whole)
        sentence.en, sentence.zh = en, zh
        return sentence

    @classmethod
    def of(cls, said: str) -> Sentence:
        """Returns a `Sentence` unchanged; uses another string for both languages."""
        return said if isinstance(said, Sentence) else cls(said, said)

    @classmethod
    def parsed(cls, said: str) -> Sentence:
        """Like `of`; splits a string ``en / zh``, as in JSON, into its halves."""
        found = None if isinstance(said, Sentence) else _BOTH.fullmatch(said)
        if found is None:
            return cls.of(said)
        before = found["before"] or ""
        return cls(before + found["en"], before + found["zh"], said)

    def __reduce__(self) -> tuple[type[Sentence], tuple[str, str, str]]:
        return type(self), (self.en, self.zh, str(self))


_BOTH = re.compile(r"(?P<before>[\w-]+: )?(?P<en>[^\n]+?) / (?P<zh>[^\n]*[\u4e00-\u9fff][^\n]*)")


def language(environ: Mapping[str, str] = os.environ) -> Literal["en", "zh"]:
    """Returns the terminal's language: ``zh`` if the first non-empty of LC_ALL, LC_MESSAGES, LANG begins with it."""
    locale = next(filter(None, map(environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return "zh" if locale.startswith("zh") else "en"


def in_locale(lines: str, environ: Mapping[str, str] = os.environ) -> str:
    """Replaces each ``en / zh`` in lines for a terminal, also after a name and a colon, by the half of its language."""
    return _BOTH.sub(rf"\g<before>\g<{language(environ)}>", lines)
