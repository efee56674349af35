"""Log records of a worker, which appear in the manager's process as if they were its own."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import queue
from typing import Any

from ..remote_errors import rebuilt, recorded
from .messages import Channel, Frame, Kind, packed, pickled, unpickled

_PLAIN = frozenset(vars(logging.makeLogRecord({})))


def levels() -> dict[str, int]:
    """Returns the levels of the loggers that have one; that of the root has the empty name."""
    loggers = logging.Logger.manager.loggerDict
    named = {name: one.level for name, one in loggers.items() if isinstance(one, logging.Logger) and one.level}
    return {"": logging.root.level, **named}


class SentLog(logging.handlers.QueueHandler):
    """Sends log records to the manager's process."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(queue.SimpleQueue())
        self._channel = channel

    def prepare(self, record: logging.LogRecord) -> Any:
        """Returns the fields of a record; own ones that cannot be pickled are left out."""
        fields = {**vars(record), "msg": record.getMessage(), "args": None, "exc_info": None}
        if record.exc_info and (error := record.exc_info[1]) is not None:
            fields["exc_text"] = logging.Formatter().formatException(record.exc_info)
            fields["exc_info"] = recorded(error, pickled)
        for name in fields.keys() - _PLAIN:
            try:
                pickled(fields[name])
            except Exception:
                del fields[name]
        return fields

    def enqueue(self, record: Any) -> None:
        if not self._channel.sends_here:  # else it is from a finalizer, in the middle of a frame
            with contextlib.suppress(OSError):
                self._channel.send(Kind.LOG, 0, packed(record))


def log(frame: Frame) -> None:
    """Handles a record of a worker."""
    with contextlib.suppress(Exception):  # handlers, and fields of classes that are not available here
        fields = frame.unpickled(_no_part, installed_only=True)
        if (failure := fields["exc_info"]) is not None:
            error = rebuilt(failure, lambda data: unpickled(data, (), _no_part, installed_only=True))
            fields["exc_info"] = type(error), error, None
        record = logging.makeLogRecord(fields)
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)


def _no_part(path: Any) -> Any:
    raise TypeError("log records have no parts")
