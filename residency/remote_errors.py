"""Errors that cross a process boundary: with their type, fields, causes, and the frames of the worker's traceback."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from inspect import ismemberdescriptor
from typing import Any

from .errors import RemoteError
from .memory_errors import RemoteFrames

_DEEPEST = 10
"""Causes beyond this number are left out."""


@dataclass
class ErrorRecord:
    """One error, ready to be sent: the pickles of its class and fields, and its text where they cannot be loaded.

    ``frames``: the traceback of the whole, where it was raised.
    """

    kind: str
    text: str
    pickled_class: bytes | None
    fields: list[tuple[str, bytes]] = field(default_factory=list)
    arguments: list[bytes] = field(default_factory=list)
    frames: str = ""
    suppresses_context: bool = False
    cause: ErrorRecord | None = None
    context: ErrorRecord | None = None


def recorded(error: BaseException, pickle: Callable[[Any], bytes], depth: int = 0) -> ErrorRecord:
    """Returns the record of an error. Fields that cannot be pickled become their text. Never raises."""

    def saved(value: Any) -> bytes:
        return _pickled(value, pickle) or pickle(_text(value, repr))

    record = ErrorRecord(type(error).__qualname__, _text(error, str), _pickled(type(error), pickle))
    record.arguments = list(map(saved, error.args))
    record.fields = [(name, saved(value)) for name, value in _fields(error).items()]
    if not depth:
        with suppress(Exception):
            record.frames = "".join(traceback.format_exception(error))
    record.suppresses_context = error.__suppress_context__
    if depth < _DEEPEST:
        record.cause = recorded(error.__cause__, pickle, depth + 1) if error.__cause__ else None
        if error.__context__ is not None and error.__context__ is not error.__cause__:
            record.context = recorded(error.__context__, pickle, depth + 1)
    return record


def rebuilt(record: ErrorRecord, unpickle: Callable[[bytes], Any]) -> BaseException:
    """Returns the error of a record, with its causes; a `RemoteError` if its class is not available here."""
    error = _rebuilt(record, unpickle)
    innermost, seen = error, {id(error)}
    while (deeper := innermost.__cause__ or innermost.__context__) and id(deeper) not in seen:
        if innermost.__cause__ is None and innermost.__suppress_context__:
            break
        innermost = deeper
        seen.add(id(deeper))
    innermost.__cause__ = RemoteFrames(record.frames)
    return error


def _rebuilt(record: ErrorRecord, unpickle: Callable[[bytes], Any]) -> BaseException:
    try:
        kind: Any = None if record.pickled_class is None else unpickle(record.pickled_class)
        arguments = tuple(map(unpickle, record.arguments))
        # Without __init__, whose parameters may be others.
        error: BaseException = _builtin_base(kind).__new__(kind, *arguments)
        error.args = arguments
    except Exception:
        error = RemoteError(record.kind, record.text)
    for name, data in record.fields:
        with suppress(Exception):  # of a class that is not available here
            object.__setattr__(error, name, unpickle(data))
    error.__cause__ = _rebuilt(record.cause, unpickle) if record.cause else None
    error.__context__ = _rebuilt(record.context, unpickle) if record.context else None
    error.__suppress_context__ = record.suppresses_context
    return error


def _fields(error: BaseException) -> dict[str, object]:
    """Returns attributes, also those of the class that is built into Python, such as an OSError's ``filename``."""
    members = {
        name: getattr(error, name, None) for base in _builtin_base(type(error)).__mro__
        for name, member in vars(base).items() if ismemberdescriptor(member) and name != "obj"
    }  # fmt: skip
    return {name: value for name, value in members.items() if value is not None} | vars(error)


def _builtin_base(kind: type[BaseException]) -> Any:
    while kind.__module__ != "builtins":
        kind = kind.__base__  # type: ignore[assignment]
    return kind


def _text(value: Any, words: Callable[[Any], str]) -> str:
    try:
        return words(value)
    except Exception:
        return f"<{type(value).__qualname__}>"


def _pickled(value: Any, pickle: Callable[[Any], bytes]) -> bytes | None:
    try:
        return pickle(value)
    except Exception:
        return None
