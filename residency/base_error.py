"""The base of all errors of this project. Users import it from `residency.errors`."""

from __future__ import annotations

from dataclasses import fields


class ResidencyError(Exception):
    """Base of this project's errors. Messages contain the next step; fields survive pickling.

    ``en`` and ``zh`` are the message in English and Chinese, ``str`` is ``en / zh``. A subclass calls ``__init__`` with
    both and its own constructor's arguments, or is a dataclass with a method `sentences`.
    """

    def __init__(self, en: str, zh: str, *fields: object) -> None:
        super().__init__(f"{en} / {zh}")
        self.en = en
        self.zh = zh
        self._fields = fields

    def __post_init__(self) -> None:
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        ResidencyError.__init__(self, *self.sentences(), *values)

    def sentences(self) -> tuple[str, str]:
        """Returns the message of a dataclass subclass in English and Chinese."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[type[ResidencyError], tuple[object, ...]]:
        return type(self), self._fields
