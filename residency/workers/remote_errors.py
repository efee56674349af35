"""Errors that cross a process boundary: with their type, fields, causes, and the frames of the worker's traceback."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import RemoteError
from ..memory_errors import RemoteFrames

_DEEPEST = 10
"""Causes beyond this number are left out."""


@dataclass
class ErrorRecord:
    """One error, ready to be sent: the pickles of its class and fields, and its text where they cannot be loaded."""

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
    """Returns the record of an error. Fields that cannot be pickled become their text."""
    try:
        text = str(error)
    except Exception:
        text = ""
    record = ErrorRecord(type(error).__qualname__, text, _pickled(type(error), pickle))
    record.arguments = [_pickled(value, pickle) or pickle(repr(value)) for value in error.args]
    for name, value in vars(error).items():
        if (data := _pickled(value, pickle)) is not None:
            record.fields.append((name, data))
    record.frames = "".join(traceback.format_tb(error.__traceback__))
    record.suppresses_context = error.__suppress_context__
    if depth < _DEEPEST:
        record.cause = recorded(error.__cause__, pickle, depth + 1) if error.__cause__ else None
        if error.__context__ is not None and error.__context__ is not error.__cause__:
            record.context = recorded(error.__context__, pickle, depth + 1)
    return record


def rebuilt(record: ErrorRecord, unpickle: Callable[[bytes], Any]) -> BaseException:
    """Returns the error of a record, with its causes; a `RemoteError` if its class is not available here."""
    try:
        kind: Any = None if record.pickled_class is None else unpickle(record.pickled_class)
        # Without __init__, whose parameters may be others.
        error: BaseException = kind.__new__(kind, *map(unpickle, record.arguments))
        error.args = tuple(map(unpickle, record.arguments))
    except Exception:
        error = RemoteError(record.kind, record.text)
    for name, data in record.fields:
        try:
            value = unpickle(data)
        except Exception:  # of a class that is not available here
            continue
        vars(error)[name] = value
    error.__cause__ = rebuilt(record.cause, unpickle) if record.cause else None
    error.__context__ = rebuilt(record.context, unpickle) if record.context else None
    error.__suppress_context__ = record.suppresses_context
    innermost = error
    while deeper := innermost.__cause__ or (None if innermost.__suppress_context__ else innermost.__context__):
        innermost = deeper
    innermost.__cause__ = RemoteFrames(record.frames)
    return error


def _pickled(value: Any, pickle: Callable[[Any], bytes]) -> bytes | None:
    try:
        return pickle(value)
    except Exception:
        return None
