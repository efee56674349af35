"""Text in English and Chinese: logs and JSON contain both, pages and terminals show one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from .units import readable_bytes

if TYPE_CHECKING:
    from .status_types import ModelStatus  # not where the launcher runs, before its packages are installed


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
    def of(cls, text: str) -> Sentence:
        """Returns a `Sentence` unchanged; uses another string for both languages."""
        return text if isinstance(text, Sentence) else cls(text, text)

    @classmethod
    def parsed(cls, text: str) -> Sentence:
        """Like `of`; splits a string ``en / zh``, as in JSON, into its halves."""
        found = None if isinstance(text, Sentence) else _BOTH.fullmatch(text)
        if found is None:
            return cls.of(text)
        before = found["before"] or ""
        return cls(before + found["en"], before + found["zh"], text)

    def __reduce__(self) -> tuple[type[Sentence], tuple[str, str, str]]:
        return type(self), (self.en, self.zh, str(self))


def without_surrogates(text: str) -> str:
    """Returns a text with U+FFFD in place of lone surrogates, which cannot be encoded; JSON may have them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_BOTH = re.compile(r"(?P<before>[\w-]+: )?(?P<en>[^\n]+?) / (?P<zh>[^\n]*[\u4e00-\u9fff][^\n]*)")


class ResidencyError(Exception):
    """Base of this project's errors; users import it from `residency.errors`. Fields survive pickling.

    ``en`` and ``zh`` are the message in English and Chinese with the next step, ``str`` is ``en / zh``. A subclass is a
    class with attributes ``en`` and ``zh``, a dataclass in which these are templates (``{self.name}``) or that
    overrides `sentences`, or calls ``__init__`` with both and its own constructor's arguments if these are others.
    """

    en: str
    zh: str

    def __init__(self, en: str = "", zh: str = "", *arguments: object) -> None:
        self.en, self.zh = en or self.en, zh or self.zh
        super().__init__(f"{self.en} / {self.zh}")
        self._arguments = arguments or ((en, zh) if en else ())

    def __post_init__(self) -> None:
        ResidencyError.__init__(self, *self.sentences())
        self._arguments = tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    def sentences(self) -> tuple[str, str]:
        """Returns the message of a dataclass subclass in English and Chinese."""
        return self.en.format(self=self), self.zh.format(self=self)

    def __reduce__(self) -> tuple[type[ResidencyError], tuple[object, ...]]:
        return type(self), self._arguments


@dataclass(frozen=True)
class Holder:
    """The request that uses a model: the code that took the lease, its thread, and for how many seconds.

    ``waits_for``: thread of a request for the same model for which this code waits, with a time-out.
    ``held``: text in place of the seconds.
    """

    where: str
    thread: str
    held_s: float
    waits_for: str | None = None
    held: str | None = None

    @property
    def en(self) -> str:
        waits = f", which waits for thread {self.waits_for}, which waits for the model" if self.waits_for else ""
        return f"held for {self.held or f'{self.held_s:.3g} s'} by {self.where} (thread {self.thread}){waits}"

    @property
    def zh(self) -> str:
        waits = f"，且正在等待线程 {self.waits_for}，而该线程在等待此模型" if self.waits_for else ""
        return f"{self.where}（线程 {self.thread}）已占用 {self.held or f'{self.held_s:.3g} 秒'}{waits}"


def holder_of(model: ModelStatus, held: str | None = None) -> Sentence | None:
    """Returns which code uses the model, and for how long; None if it is not in use."""
    facts = model.get("holder")  # older apps do not send it
    if not facts:
        return None
    holder = Holder(facts["where"], facts["thread"], facts["held_s"], facts.get("waits_for"), held)
    return Sentence(holder.en, holder.zh)


def remarks(model: ModelStatus) -> list[Sentence]:
    """Returns sentences on why the last move failed, and on the memory that no move frees, if there is any."""
    found = []
    if error := model["last_error"]:
        reason = Sentence.parsed(error)
        found.append(Sentence(f"Last error: {reason.en}", f"上次错误：{reason.zh}"))
    if processes := model.get("outside_processes"):
        size = readable_bytes(sum((each["device_bytes"] or 0) + (each["host_bytes"] or 0) for each in processes))
        pids = ", ".join(f"pid {each['pid']} {each['command']}" for each in processes)
        en, zh = "Release the model to free it", "释放模型可以腾出"
        if model["state"] == "released":
            en = "The model was released, but the memory is still in use: end that process"
            zh = "模型已释放，仍在占用：请结束该进程"
        found.append(Sentence(f"{size} of unmanaged memory ({pids}). {en}", f"未受管理的内存 {size}（{pids}）。{zh}"))
    return found


def language(environ: Mapping[str, str] = os.environ) -> Literal["en", "zh"]:
    """Returns the terminal's language: ``zh`` if the first non-empty of LC_ALL, LC_MESSAGES, LANG begins with it."""
    locale = next(filter(None, map(environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return "zh" if locale.startswith("zh") else "en"


def in_locale(lines: str, environ: Mapping[str, str] = os.environ) -> str:
    """Replaces each ``en / zh`` in lines for a terminal, also after a name and a colon, by the half of its language."""
    return _BOTH.sub(rf"\g<before>\g<{language(environ)}>", lines)
