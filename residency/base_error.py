"""The base of all errors of this project. Users import it from `residency.errors`."""

from __future__ import annotations

from dataclasses import fields


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
        self._arguments = arguments

    def __post_init__(self) -> None:
        ResidencyError.__init__(self, *self.sentences())
        self._arguments = tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    def sentences(self) -> tuple[str, str]:
        """Returns the message of a dataclass subclass in English and Chinese."""
        return self.en.format(self=self), self.zh.format(self=self)

    def __reduce__(self) -> tuple[type[ResidencyError], tuple[object, ...]]:
        return type(self), self._arguments
